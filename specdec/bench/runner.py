"""Run a bench or a suite: the same requests for every arm, arms in turn, repeated, resumable."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from specdec.bench.arms import HFArm, build_arms, mode_of
from specdec.bench.config import BenchConfig, RunConfig
from specdec.bench.log import log_results
from specdec.bench.measure import PROMPT_ERRORS, Arm, Call, PowerMeter, measure_call
from specdec.bench.results import BenchResults, SuiteResults
from specdec.bench.summary import faster_than_tau, places, summarize
from specdec.bench.workloads import Group, Progress, Request, fingerprint_of, make_groups
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.compile import compile_s
from specdec.common.config import Config
from specdec.common.files import Journal
from specdec.common.provenance import machine
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

_CALL = TypeAdapter(Call)


class Key(NamedTuple):
    """One call of one arm in one repeat; calls are numbered through all groups."""

    repeat: int
    call: int
    arm: str


def run_bench(
    config: RunConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    target: HFTarget | None = None,
    groups: Sequence[Group] | None = None,
) -> BenchResults | SuiteResults:
    """Measure what is not in the folder yet and write `results.json`, or `suite.json`, there.

    Target and groups (the workload) are given where they are there already; `check_results` says
    whether the results stand. A full disk is an `OSError`, and finished calls are kept.
    """
    torch.set_num_threads(config.threads)
    target = target or load_target(**config.target.model_dump())
    groups = groups or make_groups(config, target, progress)
    with open_store(config, folder, target, groups) as store:
        turns = list(take_turns(groups, config.arm_names, config.repeats))
        missing = [turn for turn in turns if turn[0] not in store.done]

        def show(text: str) -> None:
            progress(len(store.done), len(turns), text)

        kept: dict[str, Arm] = {}
        if missing:
            is_compiled, batches = mode_of(target) != "eager", {config.rows: 0}
            if is_compiled and isinstance(config, BenchConfig):
                batches = groups[0].batches(config.rows)
                # It remembers no prompt, and must not compile again.
                kept["hf_generate"] = HFArm(config, target, {}, batches)
            warm_up(build_arms(config, target) | kept, groups, batches, show)
            if is_compiled:
                store.note(compile_s=compile_s())
        meter = PowerMeter(target.device)
        for (repeat, group), together in groupby(missing, lambda turn: (turn[0].repeat, turn[1])):
            # Nothing that one group left behind helps the next.
            arms = build_arms(config, target) | kept
            for key, _, requests in together:
                show(f"{key.arm}, repeat {repeat + 1}, {group}, call {key.call + 1}")
                store.add(key, measure_call(arms[key.arm], requests, target.device, meter))
        show("all calls")
    results = summarize(config, target, groups, store.done, store.provenance)
    results.write(folder)
    if missing:
        log_results(results)
    return results


def take_turns(
    groups: Sequence[Group], names: Sequence[str], repeats: int
) -> Iterator[tuple[Key, str, list[Request]]]:
    """Every call of every arm, with its group: all arms serve a call before the next one begins.

    Another arm goes first each time, so that none always meets a cold machine.
    """
    calls = [(group.name, requests) for group in groups for requests in group.calls]
    for repeat in range(repeats):
        for number, (group, requests) in enumerate(calls):
            leader = (repeat + number) % len(names)
            for name in (*names[leader:], *names[:leader]):
                yield Key(repeat, number, name), group, requests


def warm_up(
    arms: Mapping[str, Arm],
    groups: Sequence[Group],
    batches: Iterable[int],
    show: Callable[[str], None],
) -> None:
    """Have every arm decode the first requests of the largest call, cut short."""
    largest = max((call for group in groups for call in group.calls), key=len)
    short = [
        replace(each, max_new_tokens=min(32, each.max_new_tokens), arrival_s=None)
        for each in largest
    ]
    for rows, (name, arm) in product(batches, arms.items()):
        show(f"warm-up {name}")
        try:
            arm(short[:rows], lambda: None)
        except ValueError:
            raise  # the requests are sound, so the options are not
        except PROMPT_ERRORS:
            pass  # the measurement meets it again, and keeps the reason


# --- Records ---


class Store(Journal):
    """`records.jsonl`: every finished call, and the provenance of each start that measured any.

    What a killed run or a full disk left of a call is dropped, and that call decoded again.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], provenance: dict[str, Any]
    ) -> None:
        checks = {TARGET: partial(check_resumed, folder)}
        super().__init__(folder / "records.jsonl", identity, checks)
        self._unwritten: dict[str, Any] | None = provenance
        self.done: dict[tuple[int, int, str], Call] = {}
        self.provenance = provenance  # of the last start that measured anything
        for row in self.entries:
            # A line that is whole and says something else is one more that is damaged.
            with suppress(KeyError, TypeError, AttributeError, ValueError):
                if "provenance" in row:
                    self.provenance = dict(row["provenance"])
                else:
                    key = Key(*(row.pop(name) for name in Key._fields))
                    self.done[key] = _CALL.validate_python(row)
        self.entries.clear()

    def note(self, **facts: Any) -> None:
        """Add to the provenance of this start, which the first call writes."""
        if self._unwritten:
            self._unwritten |= facts

    def add(self, key: Key, call: Call) -> None:
        if self._unwritten:
            self.append({"provenance": self._unwritten})
            self.provenance, self._unwritten = self._unwritten, None
        self.append({**key._asdict(), **_CALL.dump_python(call, mode="json")})
        self.done[key] = call


def open_store(config: RunConfig, folder: Path, target: HFTarget, groups: Sequence[Group]) -> Store:
    """Open the records of a run; `ValueError` if the folder holds another one."""
    asked = fingerprint_of([asdict(group) for group in groups])
    provenance = provenance_of(config, asked, target)  # of now: code may be another at the end
    kept = ("config", "device", "cpu", "cpu_count", "dtype", "quantized", "compile_mode")
    identity = {
        "requests": asked,
        TARGET: as_json(identify_target(target)),
        **{name: provenance[name] for name in kept},
    }
    return Store(folder, identity, provenance)


def provenance_of(config: Config, asked: str, target: Any) -> dict[str, Any]:
    """Configuration as resolved, a fingerprint of it and of what is asked, code and machine."""
    content = config.model_dump(mode="json")
    mark = fingerprint_of([content, asked])
    return {"config": content, "config_fingerprint": mark, **machine(target)}


# --- Failed runs ---


def check_results(results: Any) -> None:
    """Fail a run that proves an arm wrong, or that measured nothing of one.

    In half precision, or quantized, greedy tokens may differ where two logits nearly tie: that is
    reported, and fails nothing.
    """
    noun = results.NOUN
    is_exact = results.provenance.dtype == "float32" and not results.provenance.quantized
    for place, arms in places(results):
        for arm in arms:
            if arm.failed == getattr(arm, f"{noun}s"):
                reason = arm.failures[0].reason
                raise RuntimeError(f"every {noun} of the arm {arm.name!r}{place} failed: {reason}")
        wrong = {arm.name: arm.mismatches for arm in arms if arm.mismatches}
        if wrong and is_exact:
            first = next(arm.differences[0] for arm in arms if arm.differences)
            raise RuntimeError(
                f"outputs differ at temperature 0 in float32{place}; {noun}s by arm: {wrong}; "
                f"first: {noun} {getattr(first, noun)} from output token {first.position} on "
                f"(top-2 logit gap {first.top2_gap}); see differences in {results.FILE}"
            )
    if impossible := faster_than_tau(results):
        raise RuntimeError("; ".join(impossible))
