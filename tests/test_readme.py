"""Every command and every block of the README runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from own_queries import write_queries
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.hub import HERE
from specdec.demo import demo_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
BLOCKS = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.S)]
SHELL = [line for block in BLOCKS for line in block]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_drafter_of_the_readme_is_lossless():
    from tiny_models import tiny_target

    from specdec import Drafter, generate, generate_baseline

    names: dict = {}
    exec(next(block for block in PYTHON if "class RepeatDrafter" in block), names)
    drafter, target = names["RepeatDrafter"](), tiny_target()
    assert isinstance(drafter, Drafter)
    ours = generate(target, drafter, [[1, 2], [3]], max_new_tokens=20)
    plain = generate_baseline(target, [[1, 2], [3]], max_new_tokens=20)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]


COMMANDS = [[line for line in block if line.startswith("specdec")] for block in BLOCKS]


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")
@pytest.mark.parametrize("commands", [block for block in COMMANDS if block])
def test_commands_run_one_after_the_other(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(write_queries(tmp_path / "data")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert done.stdout.strip()
    for card in tmp_path.glob("runs/*/drafter/README.md"):
        run_card(card.parent)


def run_card(folder):
    """Run every command of ours and every block of Python that the card of a drafter prints."""
    text = (folder / "README.md").read_text().replace(HERE, str(folder))
    text = text.replace("PATH/OF/draft", str(demo_path("draft")))  # its base is on no hub
    commands = re.findall(r"^specdec .*$", text, re.M)
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert commands
    assert blocks


def test_command_is_there_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "specdec", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("bash")])
def test_scripts_exist_and_parse(command):
    script = ROOT / command.split()[1]
    subprocess.run(["bash", "-n", str(script)], check=True)
