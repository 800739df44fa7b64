"""Sweeps: cells are benches, finished ones stay, bad ones are refused, failing ones are told of."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from json_schema import violations
from tiny_models import perturbed, tiny_llama
from typer.testing import CliRunner

from specdec.bench import runner, sweep
from specdec.bench.config import load_config
from specdec.bench.runner import run_bench
from specdec.bench.sweep import check_sweep, load_cells, run_sweep
from specdec.cli import app

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "target")
    save_checkpoint(folder / "draft", perturbed(tiny_llama(), 0.1))
    return folder


SETTINGS = "sampling: {temperature: 1}\nbatch_size: 2"
GRID = """
grid:
  sampling.temperature: [0, 1]
  batch_size: [1, 2]
"""


def write(models, folder, settings):
    (folder / "prompts.txt").write_text("hello hello\nabcabcab\nx\n")
    path = folder / "bench.yaml"
    path.write_text(
        f"""
target: {{path: {models / "target"}}}
prompts: {{source: {folder / "prompts.txt"}}}
max_new_tokens: 8
repeats: 1
threads: 1
arms:
  - name: "draft {{num_draft_tokens}}"
    type: draft_model
    options: {{path: {models / "draft"}}}
    grid: {{num_draft_tokens: [1, 3]}}
{settings}
"""
    )
    return path


@pytest.fixture
def path(models, tmp_path):
    return write(models, tmp_path, GRID)


@pytest.fixture
def loaded(monkeypatch):
    """The targets that were loaded."""
    paths = []
    load = runner.load_target

    def note(path, **options):
        paths.append(path)
        return load(path, **options)

    monkeypatch.setattr(runner, "load_target", note)
    return paths


def untimed(arm):
    return {
        key: arm[key]
        for key in ("name", "tau", "tau_ci", "tokens", "per_depth", "finish", "mismatches")
    }


def test_a_cell_gives_what_a_bench_of_its_configuration_gives(path, models, tmp_path, loaded):
    joined = run_sweep(load_cells(str(path)), tmp_path / "out")
    assert len(loaded) == 1
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == joined
    schema = json.loads((DOCS / "sweep.schema.json").read_text())
    arms = json.loads((DOCS / "results.schema.json").read_text())
    schema["$defs"] = arms["$defs"] | schema["$defs"]
    assert violations(joined, schema) == []
    check_sweep(joined)
    assert [tuple(cell["settings"].values()) for cell in joined["cells"]] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    cell = joined["cells"][3]
    (tmp_path / "single").mkdir()
    single = write(models, tmp_path / "single", SETTINGS)
    alone = run_bench(load_config(str(single)), tmp_path / "alone")
    assert [untimed(arm) for arm in cell["arms"]] == [untimed(arm) for arm in alone["arms"]]
    stored = json.loads((tmp_path / "out" / cell["folder"] / "results.json").read_text())
    assert stored["arms"] == cell["arms"]


def test_a_finished_cell_is_not_run_again_and_a_killed_one_goes_on(path, tmp_path, monkeypatch):
    out, cells = tmp_path / "out", load_cells(str(path))

    def kill(done, total, text):
        if text.startswith("cell 2 of 4") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(cells, out, kill)
    first, second = (out / "cells" / cell.name for cell in cells[:2])
    assert (first / "results.json").exists()
    assert not (second / "results.json").exists()
    before = (first / "results.json").read_bytes(), (second / "records.jsonl").read_bytes()
    runs = []
    real = sweep.run_bench
    monkeypatch.setattr(
        sweep, "run_bench", lambda config, *a, **k: runs.append(config) or real(config, *a, **k)
    )
    joined = run_sweep(cells, out)
    assert runs == [cell.config for cell in cells[1:]]
    assert (first / "results.json").read_bytes() == before[0]
    assert (second / "records.jsonl").read_bytes().startswith(before[1])
    assert run_sweep(cells, out)["cells"] == joined["cells"]
    assert len(runs) == 3


def test_a_sweep_may_grow_but_a_cell_s_folder_keeps_its_configuration(path, tmp_path):
    out = tmp_path / "out"
    run_sweep(load_cells(str(path), ["grid.batch_size=[1]", "arms=[]"]), out)
    grown = run_sweep(load_cells(str(path), ["grid.batch_size=[1,2]", "arms=[]"]), out)
    assert len(grown["cells"]) == 4
    other = load_cells(str(path), ["max_new_tokens=9", "arms=[]"])
    before = sorted(file.name for file in out.rglob("*"))
    with pytest.raises(ValueError, match=r"cell temperature=0,batch_size=1: .*another configurat"):
        run_sweep(other, out)
    assert sorted(file.name for file in out.rglob("*")) == before


@pytest.fixture
def changeable(tmp_path):
    """Two cells whose words stay while target and draft model change, and how to change one."""
    for name, amount in (("target", 0.0), ("draft", 0.1)):
        save_checkpoint(tmp_path / name, perturbed(tiny_llama(), amount))
    path = write(tmp_path, tmp_path, "grid: {batch_size: [1, 2]}")

    def change(what):
        save_checkpoint(tmp_path / what, perturbed(tiny_llama(), 0.2))

    return load_cells(str(path), ["arms.0.grid.num_draft_tokens=[3]"]), change


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("what", "named"),
    [("target", "the target's weights was"), ("draft", "the checkpoint of 'draft 3' was")],
)
def test_a_finished_cell_of_another_target_or_drafter_is_refused(changeable, tmp_path, what, named):
    (cells, change), out = changeable, tmp_path / "out"
    run_sweep(cells[:1], out)
    before = files_of(out)
    change(what)
    with pytest.raises(
        ValueError,
        match=rf"cell batch_size=1: .*cells/batch_size=1. holds .* another origin: {named} .* now; "
        r"choose another --out folder or remove this one",
    ):
        run_sweep(cells, out)
    assert files_of(out) == before
    shutil.rmtree(out / "cells" / "batch_size=1")
    check_sweep(run_sweep(cells, out))


def test_an_unfinished_cell_of_another_drafter_is_refused_before_any_runs(changeable, tmp_path):
    (cells, change), out = changeable, tmp_path / "out"

    def kill(done, total, text):
        if text.startswith("cell 1 of 1") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(cells[1:], out, kill)
    before = files_of(out)
    change("draft")
    with pytest.raises(ValueError, match=r"cell batch_size=2: .*another origin: the checkpoint"):
        run_sweep(cells, out)
    assert files_of(out) == before


def test_finished_cells_stay_with_another_commit_but_not_on_another_machine(
    changeable, tmp_path, monkeypatch
):
    (cells, _), out = changeable, tmp_path / "out"
    measured = run_sweep(cells, out)
    real = sweep.machine
    monkeypatch.setattr(sweep, "machine", lambda target: real(target) | {"git_commit": "2" * 40})
    assert run_sweep(cells, out)["cells"] == measured["cells"]
    monkeypatch.setattr(sweep, "machine", lambda target: real(target) | {"cpu": "Another"})
    with pytest.raises(ValueError, match=r"cell batch_size=1: .*another origin: cpu was .* now"):
        run_sweep(cells, out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.rule=[token,tokens]"], "cell .*rule=tokens: rule is 'tokens': did you mean"),
        (
            ["grid.rule=[token,block]", "arms=[{type: ngram, options: {num_continuations: 2}}]"],
            "rule=block: rule 'block' judges chains only but the arm 'ngram' makes trees",
        ),
        (["grid.prompts.num=[2]", "prompts.source=./gone.txt"], "cell .*'./gone.txt'"),
        (["arms=[{type: ngram, grid: {min_gram: [1]}}]"], "cell .*no option .min_gram.; .*did you"),
        (["arms=[{type: draft_model, options: {path: ./gone}}]"], "cell .*'./gone' is not a"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_before_any_does(path, tmp_path, overrides, message):
    cells = load_cells(str(path), overrides)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_sweep(cells, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def command(path, *more):
    return CliRunner().invoke(app, ["bench", str(path), *more])


def test_a_failing_cell_is_told_of_and_the_others_finish(path, tmp_path, monkeypatch):
    real = sweep.run_bench

    def failing(config, *arguments, **options):
        if config.batch_size == 2 and config.sampling.temperature == 0:
            raise MemoryError("no room for two rows")
        return real(config, *arguments, **options)

    monkeypatch.setattr(sweep, "run_bench", failing)
    done = command(path, "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "cell temperature=0,batch_size=2 failed: MemoryError: no room" in done.stderr
    assert "1 of 4 cells failed" in done.stderr
    joined = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [bool(cell["arms"]) for cell in joined["cells"]] == [True, False, True, True]
    shown = [line.split()[:3] for line in done.stdout.splitlines()]
    assert ["0", "1", "plain"] in shown
    assert ["0", "2", "failed"] in shown
    assert ["1", "2", "plain"] in shown
    monkeypatch.undo()
    assert command(path, "--out", str(tmp_path / "out")).exit_code == 0


def test_list_shows_cells_and_arms_and_runs_nothing(path, tmp_path):
    done = command(path, "--list", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1] == "temperature=0,batch_size=2: plain | hf_generate | draft 1 | draft 3"
    assert lines[-1].startswith("cells: 4;")
    assert not (tmp_path / "out").exists()


def test_a_bad_grid_is_bad_input(path, tmp_path):
    done = command(path, "grid.batchsize=[1]", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "did you mean grid.batch_size?" in done.stderr
