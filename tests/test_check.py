"""A drafter from outside: one file, named by its address or an entry point, and checked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_target
from typer.testing import CliRunner

from specdec import load_drafter
from specdec.bench.config import ArmConfig
from specdec.checkpoints import read_head
from specdec.cli import app
from specdec.lossless.cases import Case
from specdec.registry import DRAFTERS, is_registered, strategy
from specdec.train.config import DrafterConfig

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLE = next(
    each for each in re.findall(r"```python\n(.*?)```", README, re.S) if "Repeat" in each
)
LIAR = """
import torch
from specdec import BaseDrafter
from specdec.verify import Draft

class Liar(BaseDrafter):
    max_nodes = 1

    def propose(self, root, budget, sampler):
        probs = torch.zeros(len(root), 1, sampler.vocab_size)
        probs[..., :2] = 0.5
        lengths = torch.tensor(budget).clamp(max=1)
        return Draft.chain(-(lengths == 0).long()[:, None], lengths, probs)  # and no sample of it

class Plain:
    pass

class Sized(Liar):
    def __init__(self, size: int) -> None:
        pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_drafters.py").write_text(EXAMPLE)
    (tmp_path / "liars.py").write_text(LIAR)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_drafters", "liars", "boom"):
        sys.modules.pop(name, None)


def specdec(folder, *arguments):
    """Run the command in a folder that Python does not look into by itself."""
    command = [sys.executable, "-P", "-m", "specdec", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_drafter_of_the_readme_is_checked_and_used(folder):
    address = "my_drafters:RepeatDrafter"
    done = specdec(folder, "check", address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("lossless: 5 passed, 1 skipped (1: nothing was ever accepted)\n")
    done = specdec(folder, "generate", "--drafter", address, "--prompt=Hi", "--max-new-tokens=4")
    assert (done.returncode, "tau" in done.stderr) == (0, True), done.stderr
    assert "comes again. It has no options." in specdec(folder, "drafters", address).stdout


@pytest.mark.slow
def test_entry_point_is_a_name(folder):
    package = folder / "site" / "my-0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: my\nVersion: 0.1\n")
    points = "repeat = my_drafters:RepeatDrafter\nngram = my_drafters:RepeatDrafter\nbad = no:No\n"
    (package / "entry_points.txt").write_text(f"[specdec.drafters]\n{points}")
    (folder / "my_drafters.py").rename(folder / "site" / "my_drafters.py")
    script = (
        "import sys; sys.path.append('site')\n"
        "from specdec.registry import load_drafter, is_registered, trainable_kinds\n"
        "names = [type(load_drafter(name, None)).__name__ for name in ('ngram', 'suffix')]\n"
        "names += [type(load_drafter('repeat', object())).__name__, *trainable_kinds()]\n"
        "print(*names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
    )
    listed = subprocess.run(
        [sys.executable, "-m", "specdec", "drafters"],
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
    )
    assert "Guess that the last token comes again." in listed.stdout, listed.stderr
    assert "'bad' but must be importable" in " ".join(listed.stdout.split())
    drafters = "NgramDrafter SuffixDrafter RepeatDrafter"
    kinds = "dflash draft_model eagle eagle3 medusa mixture_of_attentions mtp peagle"
    assert done.stdout == f"{drafters} {kinds}\n", done.stderr


@pytest.mark.slow
def test_drafter_that_lies_about_its_probabilities_fails(folder):
    done = specdec(folder, "check", "liars:Liar")
    assert done.returncode == 1
    assert "samples do not follow the target's distribution" in done.stdout
    assert "FAILED" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere:Drafter", "must be importable (No module named 'nowhere'); start in its folder"),
        ("my_drafters:RepeatDraftr", "has no RepeatDraftr; known: BaseDrafter, RepeatDrafter; did"),
        ("liars:Plain", "must be a class with `propose`, derived from specdec.BaseDrafter"),
        ("my_drafters", "must be registered, or pkg.module:Class"),
        ("liars:Sized", "needs the option 'size'"),
        ('{"type": "liars:Liar", "size": 1}', "has no option 'size'"),
        ('{"type": "ngram", "options": 3}', "options is 3 but must be a mapping"),
        ('{"type": "ngram", "max_ngram": 3, "options": {"max_ngram": 2}}', "given twice"),
        ("{", "must be a name or a JSON object"),
    ],
)
def test_drafter_that_cannot_be_is_refused(given, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["check", given])
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_outside_class_is_loaded_but_never_trusted(folder, monkeypatch):
    monkeypatch.chdir(folder)
    drafter = load_drafter("my_drafters:RepeatDrafter", tiny_target())
    assert strategy("my_drafters:RepeatDrafter") is type(drafter)  # known, as it was typed once
    assert not is_registered(drafter)
    assert is_registered(load_drafter(DRAFTERS["ngram"], None))


def test_options_stand_beside_the_type_or_below_options():
    for options in ({"max_ngram": 2}, {"options": {"max_ngram": 2}}):
        with pytest.raises(ValueError, match="min_ngram is 3 and max_ngram 2"):
            load_drafter({"type": "ngram", "min_ngram": 3, **options}, None)
        assert ArmConfig.model_validate({"type": "ngram", **options}).options == {"max_ngram": 2}
        drafter = DrafterConfig.model_validate({"kind": "eagle", **options})
        assert drafter.options == {"max_ngram": 2}


def test_class_that_a_file_alone_names_is_not_run(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "boom.py").write_text("raise SystemExit('it ran')")
    content = {"format": 1, "layout": "specdec", "kind": "boom:Head", "options": {}}
    content |= {"tree": None, "target": None, "training": {}}
    (folder / "specdec.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"boom:Head.* its code is not run for that; give the type"
    ):
        read_head(folder)
    record = json.dumps({"kind": "boom:Head", "options": {}})
    assert DrafterConfig.model_validate_json(record).kind == "boom:Head"
    assert "boom" not in sys.modules


def test_broken_promise_fails_and_no_promise_skips():
    for promises, outcome in (({"deep"}, pytest.fail), ((), pytest.skip)):
        with pytest.raises(outcome.Exception, match="too shallow"):
            Case({}, promises=promises).require("deep", False, "too shallow")
        Case({}, promises=promises).require("deep", True, "too shallow")
