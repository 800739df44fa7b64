"""Suites on a tiny checkpoint, whose tokens are letters: a text has as many as it has letters."""

import json
from pathlib import Path

from checkpoints import save_checkpoint
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


def save_suite(folder: Path, models: Path, suite: str, keys: str) -> str:
    """A YAML of two arms beside plain decoding."""
    path = folder / f"{suite}.yaml"
    path.write_text(
        f"""
suite: {suite}
target: {{path: {models / "target"}}}
prompts: {{source: {save_pool(folder)}}}
max_new_tokens: 6
repeats: 2
threads: 1
arms:
  - {{type: ngram, options: {{min_ngram: 1}}}}
  - {{name: model, type: draft_model, options: {{path: {models / "draft"}}}}}
{keys}
"""
    )
    return str(path)
