"""Figures of one arm over some requests; definitions stand in `specdec.engine.metrics`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from specdec.bench.results import Memory, StepTimes
from specdec.bench.store import Call, Key, Peaks, Run
from specdec.bench.workloads import Group
from specdec.common.stats import Work, percentiles, tau_interval, total_speed
from specdec.engine.metrics import AcceptanceStats, StepRecord

Table = list[list[Run | None]]  # [request][repeat]; None where it failed
Calls = list[list[Call]]  # [call][repeat]
Values = list[float | None]  # one a request; None where it failed or has no value
Measure = Callable[[Run], float]


def calls_of(group: Group, first: int, arm: str, done: Mapping[Key, Call], repeats: int) -> Calls:
    """The calls of one arm in a group whose first call has this number."""
    numbers = range(first, first + len(group.calls))
    return [[done[repeat, number, arm] for repeat in range(repeats)] for number in numbers]


def table_of(calls: Calls) -> Table:
    """Runs of each request of a group in each repeat."""
    return [
        [None if isinstance(row, str) else row for row in rows]
        for repeats in calls
        for rows in zip(*(call.rows for call in repeats), strict=True)
    ]


def decode_speed(run: Run) -> float:
    """Tokens/s after the first chunk; nan without a later token."""
    later = len(run.tokens) - run.num_first
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def decode_work(table: Table) -> list[Work | None]:
    """Tokens after the first chunk of each request, and their seconds."""
    return _work(table, lambda run: len(run.tokens) - run.num_first, decode_speed)


def _whole_work(table: Table, waited: Measure) -> list[Work | None]:
    """All tokens of each request, and the seconds waited for them."""
    return _work(table, lambda run: len(run.tokens), lambda run: len(run.tokens) / waited(run))


def _work(table: Table, tokens: Measure, speed: Measure) -> list[Work | None]:
    """A request's mean tokens at its median speed: one slow repeat moves nothing."""
    found: list[Work | None] = []
    for row, typical in zip(table, medians(table, speed), strict=True):
        counts = [tokens(run) for run in row if run is not None]
        mean = sum(counts) / len(counts) if counts else 0
        found.append(Work(mean, mean / typical) if typical else None)
    return found


def medians(table: Table, measure: Measure) -> Values:
    """Each request's median over its repeats; failed ones and those without a value are None."""
    return [_median(measure(run) for run in row if run is not None) for row in table]


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return median(finite) if finite else None


def _present(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def paired_ratios(table: Table, baseline: Table) -> Values:
    """Each request's median of the ratios of decode speeds, paired within each repeat."""
    return [
        _median(
            decode_speed(a) / decode_speed(b)
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        )
        for ours, theirs in zip(table, baseline, strict=True)
    ]


def records_of(runs: Iterable[Run | None]) -> list[StepRecord]:
    """Verify steps of the runs that did not fail."""
    return [record for run in runs if run is not None for record in run.records]


def step_times(records: Sequence[StepRecord]) -> StepTimes:
    """Seconds by part of the step; a batch's time counts once, not once a row."""
    parts = {
        part: sum(getattr(record, f"{part}_s") / record.batch_size for record in records)
        for part in ("draft", "target", "verify", "commit", "wall")
    }
    other = 2 * parts["wall"] - sum(parts.values())
    return StepTimes(**parts, other=other)


def headline(table: Table, plain: Table) -> dict[str, Any]:
    """Tau and speeds with their intervals."""
    records, work = records_of(chain(*table)), decode_work(table)
    by_request = [AcceptanceStats.from_records(records_of(row)) for row in table]
    return {
        "tau": AcceptanceStats.from_records(records).accepted_length if records else None,
        "tau_ci": tau_interval(by_request) if records else None,
        **total_speed("decode_tokens_per_s", [work]),
        **total_speed("speedup_vs_plain", [work], [decode_work(plain)]),
    }


def arm_figures(
    table: Table, plain: Table, waited: Measure, ttft: Measure, wanted: Sequence[int]
) -> dict[str, Any]:
    """Figures that every arm has; `waited` and `ttft` are seconds of a run, queue or not."""
    records = records_of(chain(*table))
    stats, times = AcceptanceStats.from_records(records), step_times(records)
    assert abs(1 + sum(stats.acceptance_at_depth) - stats.accepted_length) < 1e-9
    ratios = _present(paired_ratios(table, plain))
    whole, whole_plain = (_whole_work(each, waited) for each in (table, plain))
    by_request = {"ttft_s": ttft, "itl_s": lambda run: 1 / decode_speed(run)}
    return {
        **headline(table, plain),
        "mean_speedup_vs_plain": float(np.mean(ratios)) if ratios else None,
        **total_speed("end_to_end_speedup_vs_plain", [whole], [whole_plain]),
        "acceptance_rate": stats.acceptance_rate if records else None,
        "per_depth": list(stats.acceptance_at_depth),
        "per_depth_conditional": list(stats.conditional_acceptance_at_depth),
        "loop_efficiency": (times.draft + times.target) / times.wall if times.wall else None,
        "time_s": times,
        **{key: over_requests(table, each, wanted) for key, each in by_request.items()},
        "tokens": sum(len(row[0].tokens) for row in table if row[0] is not None),
        "failed": sum(any(run is None for run in row) for row in table),
    }


def over_requests(table: Table, measure: Measure, wanted: Sequence[int]) -> dict[str, float]:
    """Percentiles over requests of the median of their repeats."""
    return percentiles(_present(medians(table, measure)), wanted)


def largest_memory(calls: Iterable[Call]) -> Memory:
    """The largest figure of each kind; None where none was taken."""
    peaks = [call.memory for call in calls]
    return Memory(
        **{
            each.name: max(
                (v for p in peaks if (v := getattr(p, each.name)) is not None), default=None
            )
            for each in fields(Peaks)
        }
    )
