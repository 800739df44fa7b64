"""SIGTERM and Ctrl-C end a run behind its running step, and lose nothing."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from tiny_training import logged, write_run

from specdec.train import trainer as interruption
from specdec.train.config import load_train_config
from specdec.train.run import run_training
from specdec.train.trainer import Interrupted, Interruption

# Step 6, behind which the runs below are stopped, is one of those with an evaluation.
SETTINGS = {"drafter": {"kind": "eagle"}, "max_steps": 9, "save_every": 4, "eval_every": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with config, and with an uninterrupted run in `out`."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(load_train_config(str(write_run(folder, **SETTINGS))), folder / "out")
    return folder


def stopping_at_five(number):
    def callback(done, total, text):
        if done == 5:
            os.kill(os.getpid(), number)

    return callback


def assert_resumes(whole, out):
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert len(logged(out)) == 6
    run_training(load_train_config(str(whole / "train.yaml")), out)
    for kind in ("step", "evaluation"):
        assert logged(out, kind) == logged(whole / "out", kind)


COMMAND = """
import os, signal, sys
from specdec.cli import app
from specdec.train import run

def stopping(config, out, show):
    return real(config, out, lambda done, *_: done == 5 and os.kill(os.getpid(), signal.SIGINT))

real, run.run_training = run.run_training, stopping
app(["train", sys.argv[1], "--out", sys.argv[2]])
"""


def test_ctrl_c_writes_a_checkpoint_that_the_same_command_resumes(whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, str(whole / "train.yaml"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "stopped by Ctrl-C at" in done.stderr
    assert "checkpoint-6; the same command resumes from there" in " ".join(done.stderr.split())
    assert_resumes(whole, out)


def test_sigterm_writes_a_checkpoint_and_handlers_are_restored(whole, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = load_train_config(str(whole / "train.yaml"))
    with pytest.raises(Interrupted, match=r"SIGTERM at .*checkpoint-6; the same") as caught:
        run_training(config, tmp_path / "out", stopping_at_five(signal.SIGTERM))
    assert caught.value.status == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert_resumes(whole, tmp_path / "out")


def test_a_second_ctrl_c_stops_at_once_and_a_launchers_echo_of_the_first_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.counts == [1, 1]
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_in_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
