"""A stopped or killed run goes on as if nothing had happened, and keeps to its own folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import STOPPING, logged, tiny_config, write_run

from specdec.train import trainer
from specdec.train.config import load_train_config
from specdec.train.run import run_training
from specdec.train.trainer import noted_signals

pytestmark = pytest.mark.slow

# The noise of EAGLE-1 shows whether random numbers are resumed too. Step 6 has an evaluation.
SETTINGS = {
    "drafter": {"kind": "eagle"},
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "max_steps": 9,
    "save_steps": 4,
    "eval_steps": 3,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with config, and with an uninterrupted run in `out`."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(load_train_config(str(write_run(folder, **SETTINGS))), folder / "out")
    return folder


def again(whole, out):
    """Give the same command again, with another folder."""
    return run_training(load_train_config(str(whole / "train.yaml")), out)


def checkpoints(out):
    return {path.name for path in out.glob("*checkpoint-*")}


def assert_same_run(folder, other):
    for kind in ("step", "evaluation"):
        assert logged(folder, kind) == logged(other, kind)
    for name in ("drafter", "checkpoint-9"):
        (ours,), (theirs,) = ((each / name).glob("*.safetensors") for each in (folder, other))
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Every run is a process of its own, but what it imports is imported once.
FORKS = """
import json, os, sys
from pathlib import Path
from specdec.train import trainer

stopping, config, folder, signals = sys.argv[1:]
for number, step in json.loads(signals).items():
    out = Path(folder, number)
    out.mkdir()
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (out / "status").write_text(str(status))
    else:
        os.dup2(os.open(out / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv[1:] = [config, str(out / "out"), str(step), number]
        exec(stopping)
"""


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """Output folder, status and stderr, by signal, of commands that send it to themselves."""
    folder = tmp_path_factory.mktemp("stopped")
    signals = json.dumps({int(signal.SIGKILL): 7, int(signal.SIGINT): 5, int(signal.SIGTERM): 5})
    given = [STOPPING, str(whole / "train.yaml"), str(folder), signals]
    subprocess.run([sys.executable, "-c", FORKS, *given], check=True)
    return {
        int(each.name): (
            each / "out",
            int((each / "status").read_text()),
            (each / "stderr").read_text(),
        )
        for each in folder.iterdir()
    }


def test_killed_run_resumes_to_the_same_bits(whole, stopped):
    out, status, stderr = stopped[signal.SIGKILL]
    assert status == -signal.SIGKILL, stderr
    assert [record["step"] for record in logged(out)] == list(range(1, 7))
    assert checkpoints(out) == {"checkpoint-4"}
    with (out / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # what a kill in the middle of a line leaves

    path = out / "checkpoint-4" / "progress.json"
    content = json.loads(path.read_text())
    content["seconds"] += 1000  # as if the first session had been a long one
    path.write_text(json.dumps(content))
    results = again(whole, out)
    assert_same_run(out, whole / "out")
    uninterrupted = json.loads((whole / "out" / "results.json").read_text())
    for key in ("steps", "tokens", "answer_tokens", "loss", "validation_loss", "offline_tau"):
        assert getattr(results, key) == uninterrupted[key]
    assert results.seconds > 1000


def is_tensors_of(step, file):
    path = os.readlink(f"/proc/self/fd/{file}")
    return f"checkpoint-{step}." in path and path.endswith(".safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), ""),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left .* the disk is full"),
    ],
    ids=["stopped", "full disk"],
)
def test_failed_save_leaves_the_older_checkpoint(whole, tmp_path, monkeypatch, error, message):
    fsync = os.fsync

    def failing(file):
        if is_tensors_of(8, file):
            raise error
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(type(error), match=message or None):
        again(whole, tmp_path)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == {"checkpoint-4"}
    again(whole, tmp_path)
    assert_same_run(tmp_path, whole / "out")


@pytest.fixture
def unfinished(whole, tmp_path):
    """A folder whose newest checkpoint is that of step 8."""
    shutil.copytree(whole / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-9")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda tensor: {}, "it lacks 'NAME'"),
        (lambda tensor: {"weight.other": tensor.clone()}, "'weight.other' is not of this run"),
        (
            lambda tensor: {"NAME": tensor[1:].contiguous()},
            r"its 'NAME' is \[31, 64\] torch.float32 but must be \[32, 64\]",
        ),
        (
            lambda tensor: {"NAME": tensor.half()},
            r"its 'NAME' is \[32, 64\] torch.float16 but must be \[32, 64\] torch.float32",
        ),
        (
            lambda tensor: {"NAME": tensor.put(torch.tensor(5), torch.tensor(torch.nan))},
            "its 'NAME' holds numbers that are not finite",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "dtype", "nan"],
)
def test_damaged_checkpoint_is_refused_by_its_tensor(whole, unfinished, fault, message):
    (path,) = (unfinished / "checkpoint-8").glob("*.safetensors")
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith("exp_avg") and tensors[k].ndim == 2)
    new = {key.replace("NAME", name): tensor for key, tensor in fault(tensors[name]).items()}
    if "weight.other" not in new:
        del tensors[name]
    save_file({**tensors, **new}, path)
    with pytest.raises(ValueError, match=message.replace("NAME", name) + ".*; remove it, and"):
        again(whole, unfinished)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_cut_checkpoint_is_refused(whole, unfinished, suffix):
    for path in (unfinished / "checkpoint-8").glob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-8' is damaged: .*; remove it, and"):
        again(whole, unfinished)


def test_newest_two_checkpoints_are_kept_without_pickles(whole):
    assert checkpoints(whole / "out") == {"checkpoint-8", "checkpoint-9"}
    names = {path.suffix for path in (whole / "out" / "checkpoint-9").iterdir()}
    assert names == {".json", ".safetensors"}


def test_finished_run_only_writes_its_results_again(whole):
    before = (whole / "out" / "log.jsonl").read_bytes()
    results = json.loads((whole / "out" / "results.json").read_text())
    found = again(whole, whole / "out").model_dump(mode="json", by_alias=True)
    assert (whole / "out" / "log.jsonl").read_bytes() == before
    for key in results.keys() - {"provenance", "seconds"}:
        assert found[key] == results[key]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.5", "training.learning_rate is 0.001 there, not 0.5"),
        ("drafter.kind=eagle3", "drafter.kind is 'eagle' there"),
        ("data.num_validation=4", "data.num_validation is 5 there, not 4"),
        ("data.path=OTHER", "rows is "),
    ],
)
def test_folder_of_another_run_is_refused(whole, tmp_path, override, message):
    rows = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[1:] + rows[:1]))
    override = override.replace("OTHER", str(tmp_path / "other.jsonl"))
    config = load_train_config(str(whole / "train.yaml"), [override])
    before = (whole / "out" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message + r".*choose another --out folder"):
        run_training(config, whole / "out")
    assert (whole / "out" / "log.jsonl").read_bytes() == before


def test_paths_threads_saving_and_gate_may_change(whole, tmp_path):
    parity = {"num_prompts": 1, "max_new_tokens": 2}
    config = tiny_config(tmp_path, **SETTINGS, logging_steps=2, parity=parity)
    config.threads, config.training.save_steps = 2, 1
    try:
        run_training(config, whole / "out")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")],
)
def test_signal_writes_a_checkpoint_that_resumes(whole, stopped, number, status, name):
    out, found, stderr = stopped[number]
    assert found == status, stderr
    said = " ".join(stderr.split())
    assert f"stopped by {name} at" in said
    assert "checkpoint-6; the same command resumes from there" in said
    assert checkpoints(out) == {"checkpoint-4", "checkpoint-6"}
    assert len(logged(out)) == 6
    again(whole, out)
    for kind in ("step", "evaluation"):
        assert logged(out, kind) == logged(whole / "out", kind)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_second_ctrl_c_stops_at_once(monkeypatch):
    before, now = handlers(), [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    with noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.2  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.keys() == {signal.SIGINT, signal.SIGTERM}
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_other_threads_leave_signals_alone():
    def inside():
        with noted_signals():
            return handlers()

    with ThreadPoolExecutor() as pool:
        assert pool.submit(inside).result() == handlers()
