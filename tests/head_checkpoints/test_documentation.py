"""docs/checkpoints.md names what there is."""

import re
from pathlib import Path

from typer.main import get_command

from specdec.checkpoints import LAYOUTS
from specdec.cli import app

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_table_lists_every_layout():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", TEXT.split("## What is checked")[0], re.M)
    assert set(rows) == set(LAYOUTS)


def test_the_commands_and_options_of_the_examples_exist():
    commands = get_command(app).commands
    examples = re.findall(r"specdec (inspect|convert)([^#`\n]*)", TEXT)
    assert len(examples) >= 4
    for name, rest in examples:
        known = {option for each in commands[name].params for option in each.opts}
        assert set(re.findall(r"--[a-z]+", rest)) <= known
    assert all(f"--to {layout}" in TEXT for layout in ("speculators", "specdec"))
