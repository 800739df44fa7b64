"""A strategy's class answers for its method, and nobody else knows a strategy by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_training import answer_rows, write_rows
from typer.testing import CliRunner

from specdec import load_target
from specdec.cli import app
from specdec.drafters.base import BaseDrafter
from specdec.drafters.heads import Head
from specdec.registry import DRAFTERS, strategy

TOY = "toy_drafters:ToyDrafter"  # of no package, and in no registry
PACKAGE = Path(__file__).parents[2] / "specdec"
NAMES = "|".join(DRAFTERS)
# A comparison with a kind, a table of kinds, or a question for a head's class.
KNOWS_A_KIND = re.compile(
    rf"\b(kind|type)\b[^=!]*(==|!=) [\"']({NAMES})[\"']"
    rf"|^\s*[\"']({NAMES})[\"']: |isinstance\([^)]*Heads?\b"
)


def test_no_module_knows_a_strategy_by_name():
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "drafters" and path.name != "registry.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if KNOWS_A_KIND.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_class_names_its_method(kind):
    found = strategy(kind)
    assert issubclass(found, BaseDrafter)
    assert found.kind == kind
    assert found.title
    assert (found.trained_as == "head") == (found.head_class is not None)
    if found.head_class:
        assert issubclass(found.head_class, Head)
        assert found.head_class.default_taps(12)[-1] <= 12


def run(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)  # it measures costs, which take long on a busy machine
def test_new_trained_head_is_one_file(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", answer_rows(load_target("demo"), 8))
    store, out, copy = (tmp_path / name for name in ("store", "run", "copy"))
    run("features", rows, "--target", "demo", "--taps", TOY, "--out", store)
    training = {
        "drafter": {"kind": TOY, "bias": False},
        "data": {"path": str(store), "num_validation": 4},
        "loss": {"weight": 2.0},
        "parity": {"num_prompts": 2, "max_new_tokens": 4},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    run("train", write_yaml(tmp_path / "train.yaml", training), "--out", out)
    assert "Toy head" in (out / "drafter" / "README.md").read_text()
    said = run("inspect", out / "drafter")
    assert "Toy head in the layout 'specdec'" in said
    assert "no optional parts" in said
    assert json.loads((out / "drafter" / "specdec.json").read_text())["kind"] == TOY
    run("export", out / "drafter", "--to", "specdec", "--out", copy)
    typed = json.dumps({"type": TOY, "path": str(copy)})
    folders = {"cwd": PACKAGE.parent / "tests", "capture_output": True, "text": True}
    for source, status, text in ((str(copy), 2, "a file names"), (typed, 0, "Toy head")):
        command = [sys.executable, "-P", "-m", "specdec", "inspect", source]
        done = subprocess.run(command, **folders)
        assert (done.returncode, text in done.stdout + done.stderr) == (status, True), done
    arms = [{"name": "mine", "type": TOY, "path": str(copy)}]
    bench = {"prompts": {"source": "demo", "num": 2}, "max_new_tokens": 4, "repeats": 1}
    config = write_yaml(tmp_path / "bench.yaml", {**bench, "arms": arms})
    run("bench", config, "--out", tmp_path / "bench")
    run("plan", config, "--quick", "--out", tmp_path / "plan")
    run("report", tmp_path / "bench", tmp_path / "plan", "--out", tmp_path / "report")
    assert "mine" in (tmp_path / "report" / "report.md").read_text()
