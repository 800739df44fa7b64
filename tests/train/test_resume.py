"""A killed run goes on as if nothing had happened, and keeps to its own folder."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from tiny_training import logged, tiny_config, write_run

from specdec.train.config import load_train_config
from specdec.train.run import run_training

# The noise of EAGLE-1 shows whether random numbers are resumed too.
SETTINGS = {
    "drafter": {"kind": "eagle"},
    "gradient_accumulation": 2,
    "batch_size": 3,
    "max_steps": 9,
    "save_every": 4,
    "eval_every": 3,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with config, and with an uninterrupted run in `out`."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(load_train_config(str(write_run(folder, **SETTINGS))), folder / "out")
    return folder


def assert_same_run(folder, other):
    for kind in ("step", "evaluation"):
        assert logged(folder, kind) == logged(other, kind)
    for name in ("drafter/model.safetensors", "checkpoint-9/model.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from specdec.train.config import load_train_config
from specdec.train.run import run_training

def kill(done, total, text):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

run_training(load_train_config(sys.argv[1]), Path(sys.argv[2]), kill)
"""


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(whole / "train.yaml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, 8))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # what a kill in the middle of a line leaves

    path = tmp_path / "checkpoint-4" / "progress.json"
    content = json.loads(path.read_text())
    content["progress"]["seconds"] += 1000  # as if the first session had been a long one
    path.write_text(json.dumps(content))
    results = run_training(load_train_config(str(whole / "train.yaml")), tmp_path)
    assert_same_run(tmp_path, whole / "out")
    uninterrupted = json.loads((whole / "out" / "results.json").read_text())
    for key in ("steps", "tokens", "answer_tokens", "loss", "validation_loss", "offline_tau"):
        assert results[key] == uninterrupted[key]
    assert results["seconds"] > 1000


def test_a_run_that_is_stopped_while_it_saves_resumes_from_the_checkpoint_before(
    whole, tmp_path, monkeypatch
):
    config = load_train_config(str(whole / "train.yaml"))
    save, calls = torch.save, []

    def interrupted(content, path):
        save(content, path)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path)
    monkeypatch.undo()
    names = {path.name for path in tmp_path.glob("*checkpoint-*")}
    assert names == {"checkpoint-4", ".checkpoint-8.partial"}
    run_training(config, tmp_path)
    assert_same_run(tmp_path, whole / "out")


def test_the_newest_two_checkpoints_are_kept(whole):
    names = {path.name for path in (whole / "out").glob("*checkpoint-*")}
    assert names == {"checkpoint-8", "checkpoint-9"}


def test_a_finished_run_only_writes_its_results_again(whole):
    before = (whole / "out" / "log.jsonl").read_bytes()
    results = json.loads((whole / "out" / "results.json").read_text())
    again = run_training(load_train_config(str(whole / "train.yaml")), whole / "out")
    assert (whole / "out" / "log.jsonl").read_bytes() == before
    assert {k: v for k, v in again.items() if k != "provenance"} == {
        k: v for k, v in results.items() if k != "provenance"
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=0.5", r"another lr \(0.001, not 0.5\)"),
        ("drafter.kind=eagle3", "another drafter.kind"),
        ("data.num_validation=4", "another data.num_validation"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(whole, override, message):
    config = load_train_config(str(whole / "train.yaml"), [override])
    before = (whole / "out" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message + r".*choose another --out folder"):
        run_training(config, whole / "out")
    assert (whole / "out" / "log.jsonl").read_bytes() == before


def test_other_rows_or_another_target_are_refused(whole, tmp_path):
    config = tiny_config(tmp_path, **SETTINGS)
    rows = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(rows[1:] + rows[:1]))
    with pytest.raises(ValueError, match="another rows"):
        run_training(config, whole / "out")


def test_paths_threads_and_saving_may_change_between_sessions(whole, tmp_path):
    config = tiny_config(tmp_path, **SETTINGS)
    config.threads, config.save_every = 2, 1
    try:
        run_training(config, whole / "out")
    finally:
        torch.set_num_threads(1)
