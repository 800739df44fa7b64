"""Every recipe is read strictly, every command in a header parses, and the demo recipes run."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import commands, parse
from own_queries import write_queries
from typer.testing import CliRunner

from specdec.checkpoints import read_head
from specdec.cli import app
from specdec.train.config import load_train_config

ROOT = Path(__file__).parents[1]
# A roofline is no training; tests/planning runs it.
EVERY = sorted((ROOT / "recipes").glob("**/*.yaml"), key=str)
RECIPES = [path for path in EVERY if not path.name.startswith("roofline")]
DEMO = sorted((ROOT / "recipes/demo").glob("*.yaml"))


def name_of(path):
    return str(path.relative_to(ROOT))


def header(path):
    """The comment at the top, without its marks."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[1:].strip() for line in lines[:end])


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_strict_and_names_its_commands(path):
    load_train_config(str(path))
    found = commands(header(path))
    assert ["train", name_of(path), "--out"] in [words[:3] for words in found]
    for words in found:
        parse(words)


def test_wrong_command_in_a_header_is_noticed():
    for words in (
        ["collect", "a", "--output", "b"],
        ["trian", "a"],
        ["train", "recipes/eagle.yaml"],
    ):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(words)
    with pytest.raises(ValueError, match="did you mean"):
        parse(["train", "recipes/eagle.yaml", "training.max_step=1", "--out", "x"])


@pytest.mark.parametrize("recipe", [p for p in RECIPES if p.parent.name == "recipes"], ids=name_of)
def test_recipe_adds_its_memory_up(recipe):
    lines = header(recipe).split("in GB:\n")[1].split("\n")
    total = next(i for i, line in enumerate(lines) if line.startswith("sum"))
    figures = [re.search(r"\s{2,}(\d+\.\d)$", line) for line in lines[:total]]
    assert sum(float(f[1]) for f in figures if f) == pytest.approx(float(lines[total].split()[1]))
    assert "an estimate" in header(recipe)
    assert "not measured yet" in header(recipe)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like the repository; what one recipe collects serves the others."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("recipes", "specdec"):
        (folder / name).symlink_to(ROOT / name)
    write_queries(folder / "data")
    return folder


LESS = {
    "from": ("--num", "60"),
    "regenerate": ("--max-new-tokens", "12"),
    "train": (
        *("training.max_steps=2", "training.per_device_train_batch_size=2", "threads=1"),
        *("data.max_rows=8", "data.num_validation=2"),
        *("parity.num_prompts=2", "parity.max_new_tokens=8"),
    ),
    "bench": ("prompts.num=2", "repeats=1", "max_new_tokens=8", "threads=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", DEMO, ids=name_of)
def test_demo_recipe_runs_as_its_header_says(place, path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(place / "data"))
    for words in commands(header(path)):
        command = [*words, *LESS.get(parse(words), ())]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
    name = path.stem.removesuffix("_draft_model").removesuffix("_heads")
    trained, measured = (
        json.loads((place / f"runs/recipes/{folder}/results.json").read_text())
        for folder in (name, f"bench-{name}")
    )
    assert trained["steps"] == 2
    assert trained["parity"]["passed"]
    assert all(arm["prompts"] == 2 and not arm["failed"] for arm in measured["arms"])
    if name != "qlora":
        exported = next(words for words in commands(header(path)) if words[0] == "export")
        assert read_head(str(place / exported[-1])).layout == exported[3]


@pytest.mark.slow
def test_domain_story_ends_with_a_table(tmp_path, monkeypatch, capsys):
    """Its commands run here, instead of in processes of their own."""

    def run_here(command, **given):
        if command[:3] != [sys.executable, "-m", "specdec"]:
            return run(command, **given)
        less = ("repeats=1", "threads=1") if command[3] == "bench" else ()
        done = CliRunner().invoke(app, [*command[3:], *less])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
        return subprocess.CompletedProcess(command, done.exit_code)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(write_queries(tmp_path / "data")))
    overrides = [word for each in LESS["train"] for word in ("--override", each)]
    sizes = ["--num", "60", "--max-new-tokens", "8", "--prompts", "2"]
    monkeypatch.setattr(sys, "argv", ["story", *sizes, *overrides, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path("recipes/domain_draft.py", run_name="__main__")
    assert done.value.code == 0
    *_, heads, before, after, where = capsys.readouterr().out.splitlines()
    assert heads.split() == ["alpha", "tau", "speed", "/", "plain"]
    for name, line in (("before", before), ("after", after)):
        assert re.fullmatch(name + r" +\d\.\d{3}( +\d\.\d\d \[\d\.\d\d, \d\.\d\d\]){2}", line)
    assert (tmp_path / "training/drafter/model.safetensors").is_file()
    assert where.endswith(f"{tmp_path}/training/drafter")
