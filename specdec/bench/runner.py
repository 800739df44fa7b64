"""Run a bench: arms in turn, repeated, paired by prompt, resumable."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specdec.bench.arms import Arm, build_arms
from specdec.bench.calls import PROMPT_ERRORS, decode_call
from specdec.bench.config import BenchConfig, TargetConfig
from specdec.bench.differences import find_differences
from specdec.bench.origin import settle_origin
from specdec.bench.outcome import Key, Outcome
from specdec.bench.processes import Processes
from specdec.bench.prompt import BenchPrompt
from specdec.bench.prompts import load_prompts, render
from specdec.bench.provenance import collect, fingerprint, fingerprint_of_ids
from specdec.bench.records import read_run
from specdec.bench.speed import faster_than_tau
from specdec.bench.store import RunStore
from specdec.bench.summary import failures, peak_memory, summarise, tabulate, throughput
from specdec.bench.turns import unfold_turns
from specdec.checkpoints.identity import identify_target
from specdec.files import replace_file
from specdec.request import encode
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.verify import get_rule

SCHEMA = "specdec-bench-3"
RESULTS = "results.json"


class GreedyMismatchError(RuntimeError):
    """At temperature 0 in float32 two arms disagreed: something is not lossless."""


def run_bench(
    config: BenchConfig,
    folder: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    *,
    target: HFTarget | None = None,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Run what is not in the folder yet and write `results.json` there.

    Args:
        config: see `load_config`.
        folder: for `records.jsonl` and `results.json`.
        progress: called with calls done, calls in all, and what runs next.
        target: of the configuration, where it is loaded already.
        processes: those that share the calls; all of them call this.

    Returns:
        The content of `results.json`; `check_results` says whether it stands. The same in
        all processes; the first one writes it.

    Raises:
        ValueError: bad configuration, prompts, or a folder of another configuration or origin, see
            `settle_origin`.
        OSError: the folder cannot be written, or is full; finished calls are kept.
        RuntimeError: another process failed.
    """
    torch.set_num_threads(config.threads)
    get_rule(config.rule)
    with processes.together():
        prompts = read_prompts(config)
        mark = fingerprint(config, prompts)
        store = RunStore(folder, mark, processes.shard)
        try:
            target = target or open_target(config.target, processes)
            # Of now: the code and the machine may be others when the run ends.
            provenance = collect(config, mark, target, processes.num)
            prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
            ids = encode_prompts(prompts, target)
            if processes.is_first:
                num_calls = len(_keys(config, range(-(-len(ids) // config.call_size))))
                provenance = settle_origin(
                    folder, provenance, target, config.arms, len(store.done), num_calls
                )
            _run_missing(config, target, ids, store, progress, processes)
        finally:
            store.close()
    done = read_run(folder, mark)
    results = {
        "schema": SCHEMA,
        "provenance": provenance,
        "target": asdict(identify_target(target)),
        "prompts": [_prompt(p, i) for p, i in zip(prompts, ids, strict=True)],
        "memory": peak_memory(done.values()),
        "arms": _arms(config, target, prompts, ids, done),
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    if processes.is_first:
        replace_file(folder / RESULTS, text.encode())
    content: dict[str, Any] = json.loads(text)
    return content


def read_prompts(config: BenchConfig) -> list[BenchPrompt]:
    """The prompts of a configuration; errors as in `load_prompts`."""
    where = config.prompts
    return load_prompts(where.source, where.num, where.data_dir, where.seed)


def encode_prompts(prompts: Sequence[BenchPrompt], target: HFTarget) -> list[list[int]]:
    """Token ids of every prompt; errors as in `encode`."""
    return [encode(render(p, target.tokenizer), target, i) for i, p in enumerate(prompts)]


def open_target(config: TargetConfig, processes: Processes) -> HFTarget:
    """Load the target that a configuration names; errors as in `load_target`."""
    return load_target(
        config.path,
        dtype=config.dtype,
        device=processes.device(config.device),
        quantization=config.quantization,
    )


def _prompt(prompt: BenchPrompt, ids: list[int]) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "domain": prompt.domain,
        "num_tokens": len(ids),
        "fingerprint": fingerprint_of_ids(ids),
    }


def _arms(
    config: BenchConfig,
    target: HFTarget,
    prompts: list[BenchPrompt],
    ids: list[list[int]],
    done: dict[Key, Outcome],
) -> list[dict[str, Any]]:
    tables = tabulate(config, done, _names(config), len(ids))
    differences = find_differences(config, tables, target, ids)
    domains = [prompt.domain for prompt in prompts]
    arms = summarise(config, tables, differences, domains, target.eos_token_ids)
    for arm in arms:
        outcomes = [outcome for (_, _, name), outcome in done.items() if name == arm["name"]]
        memory = peak_memory(outcomes)
        arm["peak_device_bytes"] = memory["peak_device_bytes"]
        arm["cache_bytes"] = memory["cache_bytes"]
        arm.update(throughput(outcomes, config.batch_size))
        arm["failures"] = failures(config, done, arm["name"])
    return arms


def _names(config: BenchConfig) -> list[str]:
    return ["plain", "hf_generate", *(arm.name for arm in config.arms)]


def check_results(results: dict[str, Any]) -> None:
    """Fail a run that proves an arm wrong, or that measured nothing of one.

    In half precision, or quantised, greedy tokens may differ where two logits nearly tie: that is
    reported, and fails nothing.

    Args:
        results: what `run_bench` returned.

    Raises:
        GreedyMismatchError: tokens differ at temperature 0 in float32.
        RuntimeError: every prompt of an arm failed, or one is faster than its tau; see
            `faster_than_tau`.
    """
    for arm in results["arms"]:
        if arm["failed"] == arm["prompts"]:
            raise RuntimeError(
                f"every prompt of the arm {arm['name']!r} failed: {arm['failures'][0]['reason']}"
            )
    provenance = results["provenance"]
    wrong = {arm["name"]: arm["mismatches"] for arm in results["arms"] if arm["mismatches"]}
    if wrong and provenance["dtype"] == "float32" and not provenance["quantized"]:
        first = next(arm["differences"][0] for arm in results["arms"] if arm["differences"])
        raise GreedyMismatchError(
            f"outputs differ at temperature 0 in float32; prompts by arm: {wrong}; first: prompt "
            f"{first['prompt']} from output token {first['position']} on (top-2 logit gap "
            f"{first['top2_gap']}); see differences in results.json"
        )
    if impossible := faster_than_tau(results):
        raise RuntimeError("; ".join(impossible))


def _run_missing(
    config: BenchConfig,
    target: HFTarget,
    ids: list[list[int]],
    store: RunStore,
    progress: Callable[[int, int, str], None],
    processes: Processes,
) -> None:
    size = config.call_size
    calls = [ids[i : i + size] for i in range(0, len(ids), size)]
    own = list(processes.share(calls))
    names = _names(config)
    keys = _keys(config, [index for index, _ in own])
    total, missing = len(keys), keys - store.done.keys()
    if missing:
        for name, arm in build_arms(config, target).items():
            progress(total - len(missing), total, f"warm-up {name}")
            _warm_up(arm, calls[0][: config.batch_size])
    for repeat in sorted({repeat for repeat, _, _ in missing}):
        arms = build_arms(config, target)
        for index, call in own:
            # Another arm goes first each time, so that none always meets a cold machine.
            turn = (repeat + index) % len(names)
            for name in names[turn:] + names[:turn]:
                key = (repeat, index, name)
                if key not in missing:
                    continue
                done = total - len(missing)
                progress(done, total, f"{name}, repeat {repeat + 1}, call {index + 1}")
                indices = range(index * size, index * size + len(call))
                store.add(key, decode_call(arms[name], call, indices, target.device))
                missing.discard(key)
                progress(done + 1, total, name)


def _keys(config: BenchConfig, calls: Sequence[int]) -> set[Key]:
    """Every arm's call of every repeat, for these numbers of calls."""
    return set(itertools.product(range(config.repeats), calls, _names(config)))


def _warm_up(arm: Arm, batch: list[list[int]]) -> None:
    try:
        arm(batch, range(len(batch)))
    except ValueError:
        raise  # the prompts are sound, so the options are not
    except PROMPT_ERRORS:
        pass  # the measurement meets it again, and keeps the reason
