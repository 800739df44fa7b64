"""Benches and suites on a tiny checkpoint, whose tokens are letters: a text has as many tokens."""

import json
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from pydantic import BaseModel
from tiny_models import perturbed, tiny_llama

WORDS = ("latte", "mocha now", "tea for two", "a small cup", "one bun", "cold brew to go")


def save_models(folder: Path) -> Path:
    """A target and a draft model that often agrees with it; 256 positions."""
    save_checkpoint(folder / "target")
    save_checkpoint(folder / "draft", perturbed(tiny_llama(), 0.1))
    return folder


def save_pool(folder: Path) -> Path:
    """Twelve texts of two domains, of 5 to 22 letters."""
    path = folder / "pool.jsonl"
    rows = [
        {"id": f"{domain}-{i}", "domain": domain, "prompt": f"{words} {domain}"[: 5 + 3 * i]}
        for domain in ("maths", "coffee")
        for i, words in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_config(folder: Path, models: Path, source: Path, keys: str) -> Path:
    """A YAML of a bench, or of the suite that its keys name."""
    path = folder / "bench.yaml"
    path.write_text(
        f"target: {{path: {models / 'target'}}}\nprompts: {{source: {source}}}\nthreads: 1\n{keys}"
    )
    return path


def save_bench(folder: Path, models: Path, texts: str, keys: str) -> Path:
    """A YAML of a bench whose prompts are lines of text."""
    (folder / "prompts.txt").write_text(texts)
    return save_config(folder, models, folder / "prompts.txt", keys)


def save_suite(folder: Path, models: Path, suite: str, keys: str) -> str:
    """A YAML of two arms beside plain decoding."""
    arms = (
        "arms: [{type: ngram, options: {min_ngram: 1}}, "
        f"{{name: model, type: draft_model, options: {{path: {models / 'draft'}}}}}]\n"
    )
    common = f"suite: {suite}\nmax_new_tokens: 6\nrepeats: 2\n{arms}"
    return str(save_config(folder, models, save_pool(folder), common + keys))


def calls_of(folder: Path) -> list[dict]:
    """The finished calls of a run."""
    rows = [json.loads(line) for line in (folder / "records.jsonl").open()]
    return [row for row in rows if "call" in row]


def key_of(row: dict) -> tuple:
    """Repeat, call and arm of a finished call."""
    return row["repeat"], row["call"], row["arm"]


def killed(when, run, *arguments):
    """Begin a run and end it, as Ctrl-C would, once `when(done, text)` holds of its progress."""

    def kill(done, total, text):
        if when(done, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*arguments, kill)


class Configuration(BaseModel):
    """One configuration of a plan."""

    name: str
    type: str = "ngram"
    options: dict[str, int] = {}
    predicted_tau: float = 1.25
    predicted_tau_ci: tuple[float, float] = (1.0, 1.5)
    predicted_speedup: float = 1.4
    predicted_speedup_ci: None = None
    is_timed: bool = True
    batch_size: int = 1


class Plan(BaseModel):
    choice: Configuration
    configurations: list[Configuration]
    trust: None = None
