"""Run a bench: arms in turn, repeated, paired by prompt, resumable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specdec.bench.arms import build_arms
from specdec.bench.config import BenchConfig
from specdec.bench.prompts import load_prompts, render
from specdec.bench.provenance import collect, fingerprint
from specdec.bench.store import RunStore
from specdec.bench.summary import summarise
from specdec.bench.turns import unfold_turns
from specdec.request import encode
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

# What ends one prompt but not the run: it is counted as failed and never timed.
PROMPT_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError)


class GreedyMismatchError(RuntimeError):
    """At temperature 0 in float32 two arms disagreed: something is not lossless."""


def run_bench(
    config: BenchConfig,
    folder: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Run what is not in the folder yet and write `results.json` there.

    Args:
        config: see `load_config`.
        folder: for `records.jsonl` and `results.json`.
        progress: called with batches done, batches in all, and what runs next.

    Returns:
        The content of `results.json`; `check_results` says whether it stands.

    Raises:
        ValueError: bad configuration, prompts, or a folder of another configuration.
    """
    torch.set_num_threads(config.threads)
    store = RunStore(folder, fingerprint(config))
    try:
        target = load_target(
            config.target.path,
            dtype=config.target.dtype,
            device=config.target.device,
            quantization=config.target.quantization,
        )
        prompts = load_prompts(
            config.prompts.source, config.prompts.num, config.prompts.data_dir, config.prompts.seed
        )
        prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
        ids = [encode(render(p, target.tokenizer), target, i) for i, p in enumerate(prompts)]
        _run_missing(config, target, ids, store, progress)
        provenance = collect(config, target)
    finally:
        store.close()
    names = ["plain", "hf_generate", *(arm.name for arm in config.arms)]
    results: dict[str, Any] = {
        "schema": "specdec-bench-1",
        "provenance": provenance,
        "arms": summarise(config, store.done, names, len(ids)),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def check_results(results: dict[str, Any]) -> None:
    """Fail a run that proves an arm wrong, or that measured nothing of one.

    Args:
        results: what `run_bench` returned.

    Raises:
        GreedyMismatchError: tokens differ at temperature 0 in float32.
        RuntimeError: every prompt of an arm failed.
    """
    where = results["provenance"]
    wrong = {arm["name"]: arm["mismatches"] for arm in results["arms"] if arm["mismatches"]}
    if wrong and where["config"]["sampling"]["temperature"] == 0 and where["dtype"] == "float32":
        raise GreedyMismatchError(
            f"outputs differ at temperature 0 in float32; prompts by arm: {wrong}; "
            "see the batches in records.jsonl"
        )
    for arm in results["arms"]:
        if arm["failed"] == arm["prompts"]:
            raise RuntimeError(
                f"every prompt of the arm {arm['name']!r} failed; see the errors in records.jsonl"
            )


def _run_missing(
    config: BenchConfig,
    target: HFTarget,
    ids: list[list[int]],
    store: RunStore,
    progress: Callable[[int, int, str], None],
) -> None:
    size = config.batch_size
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    names = ["plain", "hf_generate", *(arm.name for arm in config.arms)]
    total = config.repeats * len(batches) * len(names)
    done = len(store.done)
    if done < total:
        for name, arm in build_arms(config, target).items():
            progress(done, total, f"warm-up {name}")
            arm(batches[0], 0)
    for repeat in range(config.repeats):
        if all((repeat, b, name) in store.done for b in range(len(batches)) for name in names):
            continue
        arms = build_arms(config, target)
        for index, batch in enumerate(batches):
            # Another arm goes first each time, so that none always meets a cold machine.
            turn = (repeat + index) % len(names)
            for name in names[turn:] + names[:turn]:
                if (repeat, index, name) in store.done:
                    continue
                progress(done, total, f"{name}, repeat {repeat + 1}, batch {index + 1}")
                try:
                    store.add((repeat, index, name), arms[name](batch, index * size))
                except PROMPT_ERRORS as error:
                    store.add((repeat, index, name), f"{type(error).__name__}: {error}")
                done += 1
                progress(done, total, name)
