"""Run a suite: arms in turn, repeated, the same requests for all, resumable."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.bench.calls import PROMPT_ERRORS
from specdec.bench.differences import LogitGaps
from specdec.bench.draft_length import load_draft_length
from specdec.bench.outcome import Key
from specdec.bench.prompts import load_prompts
from specdec.bench.provenance import machine
from specdec.bench.runner import GreedyMismatchError
from specdec.bench.store import replace_file
from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.concurrent import concurrent_groups
from specdec.bench.suites.config import (
    ConcurrentConfig,
    LongContextConfig,
    MultiTurnConfig,
    SingleTurnConfig,
    SuiteConfig,
    load_suite,
)
from specdec.bench.suites.long_context import long_context_groups
from specdec.bench.suites.memory import MemoryWatch
from specdec.bench.suites.multi_turn import Progress, multi_turn_groups
from specdec.bench.suites.parting import differences
from specdec.bench.suites.power import PowerMeter
from specdec.bench.suites.served import Call, Served
from specdec.bench.suites.serving import serve
from specdec.bench.suites.single_turn import single_turn_groups
from specdec.bench.suites.store import SuiteStore
from specdec.bench.suites.summary import calls_of, describe, summarise
from specdec.bench.suites.texts import TextPool
from specdec.bench.summary import peak_memory
from specdec.engine import Engine
from specdec.interfaces import Drafter
from specdec.registry import load_drafter
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

SCHEMA = "specdec-suite-1"
RESULTS = "suite.json"
_WARM_UP_TOKENS = 8


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
        ValueError: bad configuration, prompts, or a folder of another configuration.
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
        provenance = {
            "config": asdict(config),
            "config_fingerprint": mark,
            **machine(target),
        }
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
        RuntimeError: every request of an arm failed in a group.
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


@dataclass(frozen=True)
class _Arm:
    """A drafter, None for plain decoding, and what limits its drafts."""

    drafter: Drafter | None = None
    draft_length: Any = None


def _build_arms(config: SuiteConfig, target: HFTarget) -> dict[str, _Arm]:
    """Build every arm afresh, so that nothing it saw before helps it."""
    arms = {"plain": _Arm()}
    for arm in config.arms:
        drafter = load_drafter({"type": arm.type, **arm.options}, target)
        arms[arm.name] = _Arm(drafter, load_draft_length(arm.draft_length, drafter.makes_trees))
    return arms


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
    names = ["plain", *(arm.name for arm in config.arms)]
    total = config.repeats * len(names) * sum(len(group.calls) for group in groups)
    if len(store.done) == total:
        return
    meter = PowerMeter(target.device)
    for name, arm in _build_arms(config, target).items():
        progress(len(store.done), total, f"warm-up {name}")
        _warm_up(config, target, arm, groups)
    for repeat in range(config.repeats):
        for first, group in _numbered(groups):
            keys = [
                (repeat, first + place, name)
                for place in range(len(group.calls))
                # Another arm goes first each time, so that none always meets a cold machine.
                for name in _rotated(names, repeat + first + place)
            ]
            missing = [key for key in keys if key not in store.done]
            arms = _build_arms(config, target) if missing else {}
            for key in missing:
                progress(len(store.done), total, f"{key[2]}, repeat {repeat + 1}, {group.name}")
                asks = group.calls[key[1] - first]
                store.add(key, _call(config, target, arms[key[2]], asks, meter))
                progress(len(store.done), total, key[2])


def _rotated(names: list[str], turn: int) -> list[str]:
    place = turn % len(names)
    return names[place:] + names[:place]


def _warm_up(config: SuiteConfig, target: HFTarget, arm: _Arm, groups: list[Group]) -> None:
    """The first requests of the most users, cut short."""
    most = max((call for group in groups for call in group.calls), key=len)
    firsts = {ask.user: ask for ask in reversed(most)}.values()
    short = [
        replace(ask, max_new_tokens=min(_WARM_UP_TOKENS, ask.max_new_tokens), arrival_s=None)
        for ask in firsts
    ]
    try:
        serve(_engine(config, target, arm), short, _sampling(config))
    except ValueError:
        raise  # the requests are sound, so the options are not
    except PROMPT_ERRORS:
        pass  # the measurement meets it again, and keeps the reason


def _call(
    config: SuiteConfig, target: HFTarget, arm: _Arm, asks: list[Ask], meter: PowerMeter
) -> Call:
    """Serve requests and measure; a failure is kept as its reason."""
    engine = _engine(config, target, arm)
    watch = MemoryWatch(target.device)
    meter.start()
    rows: list[Served | str]
    try:
        rows = serve(engine, asks, _sampling(config), meter.look)
    except PROMPT_ERRORS as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        rows = [reason] * len(asks)
    power = meter.stop()
    ends = [row.end_s for row in rows if isinstance(row, Served)]
    wall_s = max(ends) if len(ends) == len(rows) else None
    return Call(rows, wall_s, watch.memory(engine.peak_cache_bytes), power)


def _engine(config: SuiteConfig, target: HFTarget, arm: _Arm) -> Engine:
    max_rows, max_cache_bytes = 1, None
    if isinstance(config, ConcurrentConfig):
        max_rows, max_cache_bytes = config.max_rows, config.max_cache_bytes
    return Engine(
        target,
        arm.drafter,
        max_rows=max_rows,
        max_cache_bytes=max_cache_bytes,
        rule=config.rule,
        draft_length=arm.draft_length,
    )


def _sampling(config: SuiteConfig) -> SamplingConfig:
    return SamplingConfig(**vars(config.sampling))


def _summaries(
    config: SuiteConfig, target: HFTarget, groups: list[Group], done: dict[Key, Call]
) -> list[dict[str, Any]]:
    gaps = LogitGaps(_sampling(config), target)
    found = []
    for first, group in _numbered(groups):
        plain = calls_of(group, first, "plain", done, config.repeats)
        arms = []
        for name in ("plain", *(arm.name for arm in config.arms)):
            calls = calls_of(group, first, name, done, config.repeats)
            greedy = config.sampling.temperature == 0
            parted = differences(group, calls, plain, gaps) if greedy else None
            has_load = isinstance(config, ConcurrentConfig)
            arms.append(summarise(name, group, calls, plain, parted, has_load))
        found.append({**describe(group), "arms": arms})
    return found
