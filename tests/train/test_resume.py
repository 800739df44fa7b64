"""A killed run goes on as if nothing had happened, and keeps to its own folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    for name in ("drafter", "checkpoint-9"):
        (ours,), (theirs,) = ((each / name).glob("*.safetensors") for each in (folder, other))
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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


def is_tensors_of(step, file):
    path = os.readlink(f"/proc/self/fd/{file}")
    return f"checkpoint-{step}." in path and path.endswith(".safetensors")


def test_a_run_that_is_stopped_while_it_saves_resumes_from_the_checkpoint_before(
    whole, tmp_path, monkeypatch
):
    config = load_train_config(str(whole / "train.yaml"))
    fsync, calls = os.fsync, []

    def interrupted(file):
        fsync(file)
        calls.extend([file] * is_tensors_of(8, file))
        if calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path)
    monkeypatch.undo()
    names = {path.name for path in tmp_path.glob("*checkpoint-*")}
    assert names == {"checkpoint-4", ".checkpoint-8.partial"}
    run_training(config, tmp_path)
    assert_same_run(tmp_path, whole / "out")


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoint(whole, tmp_path, monkeypatch):
    config = load_train_config(str(whole / "train.yaml"))
    fsync = os.fsync

    def full(file):
        if is_tensors_of(8, file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    message = r"step 8 could not be written to .*: the disk is full; checkpoint-4 is intact"
    with pytest.raises(OSError, match=message):
        run_training(config, tmp_path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-4"}
    run_training(config, tmp_path)
    assert_same_run(tmp_path, whole / "out")


def broken(tensors, fault):
    name = next(name for name in tensors if name.endswith("exp_avg") and tensors[name].ndim == 2)
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors["weight.other"] = tensors[name].clone()
    elif fault == "misshapen":
        tensors[name] = tensors[name][1:].contiguous()
    elif fault == "dtype":
        tensors[name] = tensors[name].half()
    else:
        tensors[name][0, 0] = float("nan")
    return name


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "it lacks 'NAME'"),
        ("unknown", "'weight.other' is not of this run"),
        ("misshapen", r"its 'NAME' is \[31, 64\] torch.float32 but must be \[32, 64\]"),
        ("dtype", r"its 'NAME' is \[32, 64\] torch.float16 but must be \[32, 64\] torch.float32"),
        ("nan", "its 'NAME' holds numbers that are not finite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensor(whole, tmp_path, fault, message):
    shutil.copytree(whole / "out", tmp_path / "out")
    (path,) = (tmp_path / "out" / "checkpoint-9").glob("*.safetensors")
    tensors = load_file(path)
    name = broken(tensors, fault)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message.replace("NAME", name) + ".*; remove it, and"):
        run_training(load_train_config(str(whole / "train.yaml")), tmp_path / "out")


def test_a_cut_checkpoint_is_refused(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    (path,) = (tmp_path / "out" / "checkpoint-9").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-9' is damaged: a file of it cannot be read"):
        run_training(load_train_config(str(whole / "train.yaml")), tmp_path / "out")


def test_checkpoints_hold_no_pickle(whole):
    names = {path.suffix for path in (whole / "out" / "checkpoint-9").iterdir()}
    assert names == {".json", ".safetensors"}


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
