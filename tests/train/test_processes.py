"""Several processes train what one does with as many more accumulated batches, sharded or not."""

import subprocess
import sys
from signal import SIGTERM

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tiny_training import STOPPING, logged, write_run
from transformers import AutoModelForCausalLM

from specdec.train.config import load_train_config
from specdec.train.run import run_training

RUN = {
    "drafter": {"kind": "eagle3"},
    "draft_vocab_size": 40,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "num_train_epochs": 3,
    "eval_steps": 2,
    "save_steps": 2,
    "parity": {"num_prompts": 2, "max_new_tokens": 8},
}
TWICE = ["training.gradient_accumulation_steps=2"]  # what a second process does
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launched(*command):
    return subprocess.run([*LAUNCH, *command], capture_output=True, text=True, check=False)


def assert_close(folder, other, rel=1e-3):
    """Fifteen rows are four batches, two a process; every step of both runs holds the same rows."""
    for kind, keys in (("step", ["loss", "grad_norm"]), ("evaluation", ["validation_loss", "tau"])):
        ours, theirs = logged(folder, kind), logged(other, kind)
        for key in ["step", *keys]:
            expected = [each[key] for each in theirs]
            assert [each[key] for each in ours] == pytest.approx(expected, rel=rel)
    losses = [each["loss"] for each in logged(folder)]
    assert len(set(losses)) == len(losses) > 1


def drafter(folder):
    return load_file(folder / "drafter" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
def test_signal_stops_two_processes(tmp_path):
    # Enough steps for the signal to come before the last one.
    long = {**RUN, "num_train_epochs": 40, "eval_strategy": "no", "save_strategy": "no"}
    path, out, script = write_run(tmp_path, **long), tmp_path / "out", tmp_path / "stopped.py"
    script.write_text(STOPPING)
    # torchrun, told to end, tells its processes; here the first of them tells torchrun.
    stopped = launched(str(script), str(path), str(out), "2", str(int(SIGTERM)), "torchrun")
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at" in stopped.stderr
    (checkpoint,) = out.glob("*checkpoint-*")
    assert f"checkpoint-{len(logged(out))}" == checkpoint.name


TOGETHER = """
import gc, math, os, shutil, signal, sys
from pathlib import Path

from accelerate import PartialState
from torch.distributed.tensor import DTensor

from specdec.cli import main
from specdec.train.config import load_train_config
from specdec.train.trainees import HeadTrainee
from specdec.train.run import run_training
from specdec.train.trainer import Interrupted, Trainer

gc.freeze()  # every run collects garbage, and imports are none
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
sys.argv[1:] = ["train", str(folder / "train.yaml"), "--out", str(folder / "whole")]
sys.argv += ["training.report_to=tensorboard"]
try:
    main()
except SystemExit as done:
    assert not done.code

def run(config, out, *overrides):
    settings = load_train_config(str(folder / config), ["training.fsdp=true", *overrides])
    return run_training(settings, folder / out)

def failure(kind, *arguments):
    try:
        run(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(arguments)

real_step, real_train = Trainer.training_step, Trainer.train

def checked_train(self, **given):
    real_train(self, **given)
    trained = self.model.trained
    assert trained and all(isinstance(weight, DTensor) for weight in trained.values())
    tensors, _ = self._tensors()
    kept = [name for name in tensors if name.startswith("optimizer") and tensors[name].ndim]
    assert len(kept) == 2 * len(trained)
    assert all(isinstance(tensors[name], DTensor) for name in kept)

def stopping_step(self, *given):
    if rank == 1 and self.state.global_step == 3 and self.out.name == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)  # the other process has to hear of it
    return real_step(self, *given)

Trainer.train, Trainer.training_step = checked_train, stopping_step

run("train.yaml", "two")
assert "SIGTERM" in failure(Interrupted, "train.yaml", "stopped")
Trainer.training_step = real_step
assert (folder / "stopped" / "checkpoint-4").is_dir()
if rank == 0:
    shutil.copytree(folder / "stopped", folder / "moved")
PartialState().wait_for_everyone()
run("train.yaml", "stopped")
run("train.yaml", "from-one")
run("full/train.yaml", "full/two")
run("lora/train.yaml", "lora/two", "training.bf16=true")
assert "is quantized" in failure(
    ValueError, "lora/train.yaml", "qlora", "drafter.options.method=qlora"
)
apart = failure(ValueError, "train.yaml", "two" if rank else "apart")
assert "processes find checkpoints of different steps [0, 6]" in apart

def poisoned(self, batch):
    loss, parts = real_forward(self, batch)
    is_long = batch.tokens.shape[1] > 26 and self.training
    return (loss * math.nan if is_long else loss), parts

real_forward, HeadTrainee.forward = HeadTrainee.forward, poisoned
assert "of rows 'line" in failure(FloatingPointError, "train.yaml", "poisoned")
"""


def stop_at_three(done, total, text):
    if done == 3:
        raise KeyboardInterrupt


def draft_model_run(folder, method):
    folder.mkdir()
    model = tiny_llama(num_layers=2, seed=5)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "draft")
    options = {"path": str(folder / "draft"), "method": method}
    settings = {"learning_rate": 1e-3, "max_steps": 3, "eval_steps": 2}
    settings["per_device_train_batch_size"] = 4
    write_run(folder, **settings, drafter={"kind": "draft_model", "options": options})


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_of_two_processes_equal_those_of_one(tmp_path):
    config = load_train_config(str(write_run(tmp_path, **RUN)), TWICE)
    config.training.save_steps = 1
    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path / "from-one", stop_at_three)
    for method in ("full", "lora"):
        draft_model_run(tmp_path / method, method)
    (tmp_path / "together.py").write_text(TOGETHER)
    done = launched(str(tmp_path / "together.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"offline_tau"') == 1
    assert len(list((tmp_path / "whole" / "tensorboard").glob("events*"))) == 1

    one = tmp_path / "one"
    run_training(config, one)
    run_training(config, tmp_path / "moved")
    for name in ("whole", "two", "moved", "from-one"):
        assert_close(tmp_path / name, one)
        torch.testing.assert_close(drafter(tmp_path / name), drafter(one), rtol=0, atol=2e-3)
    assert len(list((tmp_path / "two" / "checkpoint-6").glob("*.safetensors"))) == 2
    for kind in ("step", "evaluation"):
        assert logged(tmp_path / "stopped", kind) == logged(tmp_path / "two", kind)
    for method, tolerance in (("full", 1e-3), ("lora", 2e-2)):
        folder = tmp_path / method
        alone = load_train_config(str(folder / "train.yaml"), TWICE)
        run_training(alone, folder / "one")
        assert_close(folder / "two", folder / "one", rel=tolerance)
        models = [
            AutoModelForCausalLM.from_pretrained(folder / name / "drafter")
            for name in ("one", "two")
        ]
        assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in models)
        torch.testing.assert_close(*(m.state_dict() for m in models), rtol=0, atol=tolerance)
