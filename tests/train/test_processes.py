"""Two processes train what one does with twice as many accumulated batches."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import logged, write_run

from specdec.train.config import load_train_config
from specdec.train.run import run_training

RUN = {
    "drafter": {"kind": "eagle3"},
    "draft_vocab_size": 40,
    "batch_size": 4,
    "lr": 1e-2,
    "num_epochs": 2,
    "eval_every": 2,
    "save_every": 2,
    "log_with": "tensorboard",
}


@pytest.mark.distributed
def test_two_processes_share_the_steps_and_one_writes(tmp_path):
    path = write_run(tmp_path, **RUN)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "-m", "specdec", "train", str(path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"offline_tau"') == 1

    alone = load_train_config(str(path), ["gradient_accumulation=2"])
    run_training(alone, tmp_path / "one")
    # Fifteen rows: four batches, two a process; every step of both runs holds the same rows.
    for kind, keys in (("step", ["loss", "grad_norm"]), ("evaluation", ["validation_loss", "tau"])):
        two, one = logged(tmp_path / "two", kind), logged(tmp_path / "one", kind)
        for key in ["step", *keys]:
            ours, theirs = [each[key] for each in two], [each[key] for each in one]
            assert ours == pytest.approx(theirs, rel=1e-3)
            assert len(set(theirs)) > 1
    heads = [
        load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("one", "two")
    ]
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=1e-3)
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1
