"""The folder of a run: what survives a kill, and whom it refuses."""

import json

import pytest

from specdec.bench.arms import Run
from specdec.bench.store import RunStore
from specdec.metrics import StepRecord


def run(num_steps):
    records = [StepRecord(0, s, 1, 4, 1, 2, 2, 0.1, 0.2, 0.4) for s in range(num_steps)]
    return Run(list(range(1 + 2 * num_steps)), 1, 0.5, 0.4 * num_steps, records)


def test_runs_come_back_as_they_were_stored(tmp_path):
    runs = [run(3), run(0), run(2)]
    store = RunStore(tmp_path, "a")
    store.add((0, 0, "model"), runs)
    store.add((0, 1, "model"), "ValueError: too long")
    store.close()
    again = RunStore(tmp_path, "a")
    again.close()
    assert again.done == {(0, 0, "model"): runs, (0, 1, "model"): "ValueError: too long"}


def test_steps_of_a_batch_that_never_finished_are_dropped(tmp_path):
    store = RunStore(tmp_path, "a")
    store.add((0, 0, "model"), [run(2)])
    store.add((0, 1, "model"), [run(3)])
    store.close()
    records = tmp_path / "records.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    # Killed after two whole steps of the second batch and within its third.
    kill_at = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "batch") + 3
    records.write_text("".join(lines[:kill_at]) + lines[kill_at][:20])
    resumed = RunStore(tmp_path, "a")
    resumed.add((0, 1, "model"), [run(3)])
    resumed.close()
    assert records.read_text() == "".join(lines)
    again = RunStore(tmp_path, "a")
    again.close()
    assert again.done[(0, 1, "model")] == [run(3)]


def test_a_folder_without_a_finished_batch_serves_any_configuration(tmp_path):
    RunStore(tmp_path, "a").close()
    store = RunStore(tmp_path, "b")
    store.add((0, 0, "plain"), [run(1)])
    store.close()
    with pytest.raises(ValueError, match="another configuration"):
        RunStore(tmp_path, "a")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot be written"):
        RunStore(tmp_path / "file", "a")
