"""Run a suite: arms in turn, repeated, the same requests for all, resumable."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specdec.bench.config import (
    ConcurrentConfig,
    LongContextConfig,
    MultiTurnConfig,
    SingleTurnConfig,
    SuiteConfig,
    load_suite,
)
from specdec.bench.measure import PowerMeter, build_arms, measure_call, sampling_of, warm_up
from specdec.bench.prompts import load_prompts
from specdec.bench.runner import GreedyMismatchError, settle_origin
from specdec.bench.store import Key
from specdec.bench.suites.store import Call, SuiteStore
from specdec.bench.suites.summary import calls_of, describe, differences, summarise
from specdec.bench.summary import LogitGaps, faster_than_tau, peak_memory
from specdec.bench.workloads import (
    Group,
    Progress,
    TextPool,
    concurrent_groups,
    long_context_groups,
    multi_turn_groups,
    single_turn_groups,
)
from specdec.common.files import replace_file
from specdec.common.provenance import machine
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

SCHEMA = "specdec-suite-2"
RESULTS = "suite.json"


def run_suite(
    path: str,
    overrides: Sequence[str],
    folder: Path,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Run what is not in the folder yet and write `suite.json` there.

    Args:
        path: of the YAML, or "demo/NAME"; see `load_suite`.
        overrides: `key=value` each.
        folder: for `suite-records.jsonl` and `suite.json`.
        progress: called with calls done, calls in all, and what runs next.

    Returns:
        The content of `suite.json`; `check_suite` says whether it stands.

    Raises:
        FileNotFoundError: no such configuration.
        ValueError: bad configuration, prompts, or a folder of another configuration or origin, see
            `settle_origin`.
        OSError: the folder cannot be written, or is full; finished calls are kept.
    """
    config = load_suite(path, overrides)
    torch.set_num_threads(config.threads)
    target = load_target(**vars(config.target))
    where = config.prompts
    prompts = load_prompts(where.source, where.num, where.data_dir, where.seed)
    groups = _groups(config, TextPool(prompts, target, config.seed), target, progress)
    mark = _fingerprint(config, groups)
    store = SuiteStore(folder, mark)
    try:
        # Of now: the code and the machine may be others when the run ends.
        now = {"config": asdict(config), "config_fingerprint": mark, **machine(target)}
        provenance = settle_origin(
            folder, now, target, config.arms, len(store.done), _num_calls(config, groups)
        )
        _run_missing(config, target, groups, store, progress)
    finally:
        store.close()
    results = {
        "schema": SCHEMA,
        "suite": config.suite,
        "provenance": provenance,
        "memory": peak_memory(store.done.values()),
        "groups": _summaries(config, target, groups, store.done),
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    replace_file(folder / RESULTS, text.encode())
    return results


def check_suite(results: dict[str, Any]) -> None:
    """Fail a suite that proves an arm wrong, or that measured nothing of one.

    Args:
        results: what `run_suite` returned.

    Raises:
        GreedyMismatchError: tokens differ at temperature 0 in float32.
        RuntimeError: every request of an arm failed in a group, or one is faster than its tau; see
            `faster_than_tau`.
    """
    exact = results["provenance"]["dtype"] == "float32" and not results["provenance"]["quantized"]
    for group in results["groups"]:
        for arm in group["arms"]:
            where = f"{arm['name']!r}, {group['name']}"
            if arm["failed"] == arm["requests"]:
                reason = arm["failures"][0]["reason"]
                raise RuntimeError(f"every request of the arm {where}, failed: {reason}")
            if arm["mismatches"] and exact:
                first = arm["differences"][0]
                raise GreedyMismatchError(
                    f"outputs differ from plain decoding at temperature 0 in float32: the arm "
                    f"{where}, request {first['request']} from output token {first['position']} on "
                    f"(top-2 logit gap {first['top2_gap']}); see differences in {RESULTS}"
                )
    if impossible := faster_than_tau(results):
        raise RuntimeError("; ".join(impossible))


def _groups(
    config: SuiteConfig, pool: TextPool, target: HFTarget, progress: Progress
) -> list[Group]:
    if isinstance(config, SingleTurnConfig):
        return single_turn_groups(config, pool)
    if isinstance(config, MultiTurnConfig):
        return multi_turn_groups(config, pool, target, progress)
    if isinstance(config, LongContextConfig):
        return long_context_groups(config, pool, target, progress)
    assert isinstance(config, ConcurrentConfig)
    return concurrent_groups(config, pool)


def _fingerprint(config: SuiteConfig, groups: list[Group]) -> str:
    """A short hash of configuration and requests: a folder of results belongs to one."""
    whole = {"config": asdict(config), "groups": [asdict(group) for group in groups]}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _names(config: SuiteConfig) -> list[str]:
    return ["plain", *(arm.name for arm in config.arms)]


def _num_calls(config: SuiteConfig, groups: list[Group]) -> int:
    """Every arm's calls in all repeats."""
    return config.repeats * len(_names(config)) * sum(len(group.calls) for group in groups)


def _numbered(groups: list[Group]) -> Iterator[tuple[int, Group]]:
    """Each group with the number of its first call in the suite."""
    first = 0
    for group in groups:
        yield first, group
        first += len(group.calls)


def _run_missing(
    config: SuiteConfig,
    target: HFTarget,
    groups: list[Group],
    store: SuiteStore,
    progress: Progress,
) -> None:
    names, total = _names(config), _num_calls(config, groups)
    if len(store.done) == total:
        return
    meter = PowerMeter(target.device)
    for name, arm in build_arms(config, target).items():
        progress(len(store.done), total, f"warm-up {name}")
        warm_up(config, target, arm, groups)
    for repeat in range(config.repeats):
        for first, group in _numbered(groups):
            keys = [
                (repeat, first + place, name)
                for place in range(len(group.calls))
                # Another arm goes first each time, so that none always meets a cold machine.
                for name in _rotated(names, repeat + first + place)
            ]
            missing = [key for key in keys if key not in store.done]
            arms = build_arms(config, target) if missing else {}
            for key in missing:
                progress(len(store.done), total, f"{key[2]}, repeat {repeat + 1}, {group.name}")
                asks = group.calls[key[1] - first]
                store.add(key, measure_call(config, target, arms[key[2]], asks, meter))
                progress(len(store.done), total, key[2])


def _rotated(names: list[str], turn: int) -> list[str]:
    place = turn % len(names)
    return names[place:] + names[:place]


def _summaries(
    config: SuiteConfig, target: HFTarget, groups: list[Group], done: dict[Key, Call]
) -> list[dict[str, Any]]:
    gaps = LogitGaps(sampling_of(config), target)
    found = []
    for first, group in _numbered(groups):
        plain = calls_of(group, first, "plain", done, config.repeats)
        arms = []
        for name in _names(config):
            calls = calls_of(group, first, name, done, config.repeats)
            greedy = config.sampling.temperature == 0
            parted = differences(group, calls, plain, gaps) if greedy else None
            has_load = isinstance(config, ConcurrentConfig)
            arms.append(summarise(name, group, calls, plain, parted, has_load))
        found.append({**describe(group), "arms": arms})
    return found
