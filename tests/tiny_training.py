"""A tiny target in a folder, dialogues with its own answers, and runs that train on them."""

import json
from functools import cache

import torch
import yaml
from tiny_models import tiny_llama

from specdec.engine.decode import generate_baseline
from specdec.targets.hf import HFTarget
from specdec.train.config import TrainingConfig, load_train_config

# `specdec train CONFIG --out OUT` that sends a signal, to itself or to torchrun, after a step.
STOPPING = """
import os, sys
from specdec.cli import app
from specdec.train import run

def stopping(config, out, show):
    whom = os.getppid() if sys.argv[5:] else os.getpid()
    return real(config, out, lambda done, *_: done == step and os.kill(whom, number))

real, run.run_training = run.run_training, stopping
step, number = map(int, sys.argv[3:5])
app(["train", sys.argv[1], "--out", sys.argv[2]])
"""


def answer_rows(target, num_rows=20, prompt_len=4, answer_len=10, seed=0):
    """Dialogues of two turns, both answers greedy; every third row has a shorter second one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, 2, prompt_len)
    prompts = torch.randint(target.vocab_size, shape, generator=generator).tolist()
    rows = []
    for number, turns in enumerate(prompts):
        tokens, answers = [], []
        for turn, prompt in enumerate(turns):
            tokens += prompt
            length = answer_len - 3 * (turn == 1 and number % 3 == 0)
            start = len(tokens)
            tokens += generate_baseline(target, [tokens], max_new_tokens=length)[0].tokens
            answers.append([start, len(tokens)])
        rows.append({"tokens": tokens, "answers": answers})
    return rows


@cache
def known_rows():
    """Rows of the target of `write_run`, made once: most runs train on them. Change copies only."""
    return tuple(answer_rows(HFTarget(tiny_llama(num_layers=3))))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder, rows=None, **settings):
    """Write target, data and config, whose path is returned; training arguments stand flat."""
    tiny_llama(num_layers=3).save_pretrained(folder / "target")
    rows = known_rows() if rows is None else rows
    write_rows(folder / "answers.jsonl", rows)
    config = {
        "target": {"path": str(folder / "target"), "device": "cpu"},
        "data": {"path": str(folder / "answers.jsonl"), "num_validation": len(rows) // 4},
        "threads": 1,
        "parity": {"num_prompts": 4, "max_new_tokens": 12},
        "training": {"warmup_steps": 2, "per_device_train_batch_size": 5},
    }
    for key, value in settings.items():
        if key in TrainingConfig.model_fields:
            config["training"][key] = value
        else:
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def tiny_config(folder, rows=None, **settings):
    return load_train_config(str(write_run(folder, rows, **settings)))


def logged(folder, kind="step"):
    """Lines of a run's log, without the wall clock."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    clock = "tokens_per_s"
    return [
        {name: value for name, value in record.items() if name != clock}
        for record in records
        if record["kind"] == kind
    ]
