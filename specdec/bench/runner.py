"""Run a bench or a suite: the same requests for every arm, arms in turn, repeated, resumable."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specdec.bench.arms import build_arms
from specdec.bench.config import RunConfig
from specdec.bench.measure import PROMPT_ERRORS, Arm, measure_call
from specdec.bench.meters import PowerMeter
from specdec.bench.results import BenchResults, SuiteResults
from specdec.bench.store import Key, Store
from specdec.bench.summary import faster_than_tau, summarize
from specdec.bench.workloads import (
    Group,
    Progress,
    Request,
    fingerprint_of,
    make_groups,
    numbered,
)
from specdec.checkpoints.identity import TARGET, as_json, identify_target
from specdec.common.provenance import machine
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

_WARM_UP_TOKENS = 32
# Facts of the machine that make a run the same run.
_MACHINE = ("device", "cpu", "cpu_count", "dtype", "quantized")


class GreedyMismatchError(RuntimeError):
    """At temperature 0 in float32 two arms disagreed: something is not lossless."""


class Turn(NamedTuple):
    """One call of one arm in one repeat."""

    key: Key
    group: str
    requests: list[Request]


def run_bench(
    config: RunConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    target: HFTarget | None = None,
    groups: Sequence[Group] | None = None,
) -> BenchResults | SuiteResults:
    """Measure what is not in the folder yet and write `results.json`, or `suite.json`, there.

    Args:
        config: a bench or a suite.
        folder: holds `records.jsonl` and the results.
        progress: called with calls done, calls in all, and what runs next.
        target: target of the configuration, where it is loaded already.
        groups: workload of the configuration, where it is made already.

    Returns:
        The results; `check_results` says whether they stand.

    Raises:
        ValueError: bad configuration or prompts, or a folder of another configuration, target or
            machine.
        OSError: the folder cannot be written, or is full; finished calls are kept.
    """
    torch.set_num_threads(config.threads)
    target = target or load_target(**config.target.model_dump())
    groups = groups or make_groups(config, target, progress)
    with open_store(config, folder, target, groups) as store:
        turns = list(take_turns(groups, config.arm_names, config.repeats))
        missing = [turn for turn in turns if turn.key not in store.done]
        if missing:
            short = _warm_up_requests(groups, config.rows)
            for name, arm in build_arms(config, target).items():
                progress(len(store.done), len(turns), f"warm-up {name}")
                _warm_up(arm, short)
        meter = PowerMeter(target.device)
        for _, together in groupby(missing, key=lambda turn: (turn.key[0], turn.group)):
            arms = build_arms(config, target)  # nothing that one group left behind helps the next
            for (repeat, number, name), group, requests in together:
                where = f"{name}, repeat {repeat + 1}, {group}, call {number + 1}"
                progress(len(store.done), len(turns), where)
                call = measure_call(arms[name], requests, target.device, meter)
                store.add((repeat, number, name), call)
                progress(len(store.done), len(turns), name)
    results = summarize(config, target, groups, store.done, store.provenance)
    results.write(folder)
    return results


def open_store(config: RunConfig, folder: Path, target: HFTarget, groups: Sequence[Group]) -> Store:
    """Open the records of a run; `ValueError` if the folder holds another one."""
    asked = fingerprint_of([asdict(group) for group in groups])
    provenance = provenance_of(config, asked, target)  # of now: code may be another at the end
    identity = {
        "config": provenance["config"],
        "requests": asked,
        TARGET: as_json(identify_target(target)),
        **{name: provenance[name] for name in _MACHINE},
    }
    return Store(folder, identity, provenance)


def provenance_of(config: RunConfig, asked: str, target: HFTarget) -> dict[str, Any]:
    """Configuration as resolved, a fingerprint of it and of what is asked, code and machine."""
    content = config.model_dump(mode="json")
    mark = fingerprint_of([content, asked])
    return {"config": content, "config_fingerprint": mark, **machine(target)}


def take_turns(groups: Sequence[Group], names: Sequence[str], repeats: int) -> Iterator[Turn]:
    """Every call of every arm: all arms serve a call before the next call begins.

    Another arm goes first each time, so that none always meets a cold machine.
    """
    for repeat in range(repeats):
        for first, group in numbered(groups):
            for number, requests in enumerate(group.calls, first):
                leader = (repeat + number) % len(names)
                for name in (*names[leader:], *names[:leader]):
                    yield Turn((repeat, number, name), group.name, requests)


def _warm_up_requests(groups: Sequence[Group], max_rows: int) -> list[Request]:
    """The first requests of the largest call, cut short, as many as are decoded together."""
    largest = max((call for group in groups for call in group.calls), key=len)
    firsts = {request.user: request for request in reversed(largest)}
    short = [
        replace(each, max_new_tokens=min(_WARM_UP_TOKENS, each.max_new_tokens), arrival_s=None)
        for each in reversed(firsts.values())
    ]
    return short[:max_rows]


def _warm_up(arm: Arm, requests: Sequence[Request]) -> None:
    try:
        arm(requests, lambda: None)
    except ValueError:
        raise  # the requests are sound, so the options are not
    except PROMPT_ERRORS:
        pass  # the measurement meets it again, and keeps the reason


def check_results(results: BenchResults | SuiteResults) -> None:
    """Fail a run that proves an arm wrong, or that measured nothing of one.

    In half precision, or quantized, greedy tokens may differ where two logits nearly tie: that is
    reported, and fails nothing.

    Raises:
        GreedyMismatchError: tokens differ at temperature 0 in float32.
        RuntimeError: every request of an arm failed, or one is faster than its tau; see
            `faster_than_tau`.
    """
    noun = results.NOUN
    is_exact = results.provenance.dtype == "float32" and not results.provenance.quantized
    for place, arms in results.parts:
        for arm in arms:
            if arm.failed == getattr(arm, f"{noun}s"):
                reason = arm.failures[0].reason
                raise RuntimeError(f"every {noun} of the arm {arm.name!r}{place} failed: {reason}")
        wrong = {arm.name: arm.mismatches for arm in arms if arm.mismatches}
        if wrong and is_exact:
            first = next(arm.differences[0] for arm in arms if arm.differences)
            raise GreedyMismatchError(
                f"outputs differ at temperature 0 in float32{place}; {noun}s by arm: {wrong}; "
                f"first: {noun} {getattr(first, noun)} from output token {first.position} on "
                f"(top-2 logit gap {first.top2_gap}); see differences in {results.FILE}"
            )
    if impossible := faster_than_tau(results):
        raise RuntimeError("; ".join(impossible))
