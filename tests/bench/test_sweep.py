"""Sweeps: cells are benches, finished ones stay, bad ones are refused, failing ones are told of."""

import json

import pytest
from checkpoints import save_checkpoint
from tiny_models import perturbed, tiny_llama
from tiny_suites import killed, save_bench
from typer.testing import CliRunner

from specdec.bench import runner, sweep
from specdec.bench.config import load_cells, load_config
from specdec.bench.results import BenchResults, SweepResults
from specdec.bench.runner import run_bench
from specdec.bench.sweep import check_sweep, run_sweep
from specdec.cli import app

GRID = """
grid:
  sampling.temperature: [0, 1]
  batch_size: [1, 2]
"""


def write(models, folder, settings):
    arm = (
        'arms: [{name: "draft {num_draft_tokens}", type: draft_model, options: '
        f"{{path: {models / 'draft'}}}, grid: {{num_draft_tokens: [1, 3]}}}}]"
    )
    keys = f"max_new_tokens: 8\nrepeats: 1\n{arm}\n{settings}"
    return save_bench(folder, models, "hello hello\nabcabcab\nx\n", keys)


@pytest.fixture
def path(models, tmp_path):
    return write(models, tmp_path, GRID)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cell_gives_what_its_bench_gives(path, models, tmp_path, monkeypatch):
    loaded = []
    load = sweep.load_target
    monkeypatch.setattr(sweep, "load_target", lambda path, **o: loaded.append(1) or load(path, **o))
    joined = run_sweep(load_cells(str(path)), tmp_path / "out")
    assert len(loaded) == 1
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert SweepResults.read(written) == joined
    check_sweep(joined)
    settings = [tuple(cell.settings.values()) for cell in joined.cells]
    assert settings == [(0, 1), (0, 2), (1, 1), (1, 2)]
    cell = joined.cells[3]
    single = write(models, tmp_path, "sampling: {temperature: 1}\nbatch_size: 2")
    alone = run_bench(load_config(str(single)), tmp_path / "alone")
    keys = {"name", "tau", "tau_ci", "tokens", "per_depth", "finish", "mismatches"}
    untimed = [[arm.model_dump(include=keys) for arm in each.arms] for each in (cell, alone)]
    assert untimed[0] == untimed[1]
    stored = json.loads((tmp_path / "out" / cell.folder / "results.json").read_text())
    assert BenchResults.read(stored).arms == cell.arms


def test_finished_cell_stays_and_killed_one_goes_on(path, tmp_path, measured):
    out, cells = tmp_path / "out", load_cells(str(path))
    killed(lambda done, text: text.startswith("cell 2 of 4") and done == 3, run_sweep, cells, out)
    first, second = (out / "cells" / cell.name for cell in cells[:2])
    assert (first / "results.json").exists()
    assert not (second / "results.json").exists()
    before = (first / "results.json").read_bytes(), (second / "records.jsonl").read_bytes()
    joined = run_sweep(cells, out)
    assert (first / "results.json").read_bytes() == before[0]
    assert (second / "records.jsonl").read_bytes().startswith(before[1])
    assert run_sweep(cells, out).cells == joined.cells
    # Four arms and three prompts a cell of batch 1, two batches of them in one of batch 2.
    assert len(measured) == 4 * (3 + 2 + 3 + 2)


def test_sweep_may_grow_but_keep_its_cells_configurations(path, tmp_path):
    out = tmp_path / "out"
    run_sweep(load_cells(str(path), ["grid.batch_size=[1]", "arms=[]"]), out)
    grown = run_sweep(load_cells(str(path), ["grid.batch_size=[1,2]", "arms=[]"]), out)
    assert len(grown.cells) == 4
    other = load_cells(str(path), ["max_new_tokens=9", "arms=[]"])
    before = files_of(out)
    with pytest.raises(ValueError, match=r"cell temperature=0,batch_size=1: .*max_new_tokens is 8"):
        run_sweep(other, out)
    assert files_of(out) == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_cell_of_another_target_is_refused_before_any_runs(tmp_path, is_finished):
    target, out = save_checkpoint(tmp_path / "target"), tmp_path / "out"
    save_checkpoint(tmp_path / "draft", perturbed(tiny_llama(), 0.1))
    cells = load_cells(str(write(tmp_path, tmp_path, "grid: {batch_size: [1, 2]}")), ["arms=[]"])
    if is_finished:
        run_sweep(cells[1:], out)
    else:
        killed(lambda done, text: done == 2, run_sweep, cells[1:], out)
    before = files_of(out / "cells" / "batch_size=2")
    save_checkpoint(target, perturbed(tiny_llama(), 0.2))
    with pytest.raises(
        ValueError, match=r"cell batch_size=2: .*is of another target: weights was .* choose anothe"
    ):
        run_sweep(cells, out)
    assert files_of(out / "cells" / "batch_size=2") == before
    assert not (out / "cells" / "batch_size=1" / "results.json").exists()


def test_finished_cells_stay_with_another_commit_not_machine(path, tmp_path, monkeypatch):
    cells, out = load_cells(str(path), ["grid.batch_size=[1]", "arms=[]"]), tmp_path / "out"
    measured = run_sweep(cells, out)
    real = runner.machine
    monkeypatch.setattr(runner, "machine", lambda target: real(target) | {"git_commit": "2" * 40})
    assert run_sweep(cells, out).cells == measured.cells
    monkeypatch.setattr(runner, "machine", lambda target: real(target) | {"cpu": "Another"})
    with pytest.raises(ValueError, match=r"cell temperature=0,batch_size=1: .*cpu is .* 'Another'"):
        run_sweep(cells, out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.rule=[token,tokens]"], "cell .*rule=tokens: .*rule is 'tokens': did you mean"),
        (
            ["grid.rule=[token,block]", "arms=[{type: ngram, options: {num_continuations: 2}}]"],
            "rule=block: rule 'block' judges chains only but this drafter makes trees",
        ),
        (["grid.prompts.num=[2]", "prompts.source=./gone.txt"], "cell .*'./gone.txt'"),
        (["arms=[{type: ngram, grid: {min_gram: [1]}}]"], "cell .*no option .min_gram.; .*did you"),
        (["arms=[{type: draft_model, options: {path: ./gone}}]"], "cell .*'./gone' is not a"),
    ],
)
def test_impossible_cell_is_refused_before_any_runs(path, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(load_cells(str(path), overrides), tmp_path / "out")
    assert not list(tmp_path.rglob("results.json"))


def command(path, *more):
    return CliRunner().invoke(app, ["bench", str(path), *more])


def test_failing_cell_leaves_the_others_to_finish(path, tmp_path, monkeypatch):
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
    shown = [tuple(line.split()[:3]) for line in done.stdout.splitlines()]
    assert {("0", "1", "plain"), ("0", "2", "failed"), ("1", "2", "plain")} <= set(shown)
    monkeypatch.undo()
    assert command(path, "--out", str(tmp_path / "out")).exit_code == 0


def test_list_shows_cells_and_runs_nothing(path, tmp_path):
    done = command(path, "--list", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1] == "temperature=0,batch_size=2: plain | hf_generate | draft 1 | draft 3"
    assert lines[-1].startswith("cells: 4;")
    assert not (tmp_path / "out").exists()
