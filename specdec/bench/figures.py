"""Figures of one arm over some requests; definitions stand in `specdec.engine.metrics`."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from statistics import mean, median
from typing import Any

import numpy as np

from specdec.bench.measure import Call, Run
from specdec.bench.results import Load, Memory, StepTimes
from specdec.bench.workloads import Request
from specdec.common import stats
from specdec.common.stats import Work
from specdec.engine.metrics import AcceptanceStats, StepRecord

Table = list[list[Run | str]]  # [request][repeat]; the reason where it failed
Measure = Callable[[Run], float]


def runs_of(rows: Iterable[Run | str]) -> list[Run]:
    """The runs that did not fail."""
    return [row for row in rows if isinstance(row, Run)]


def records_of(rows: Iterable[Run | str]) -> list[StepRecord]:
    return [record for run in runs_of(rows) for record in run.records]


def acceptance(rows: Iterable[Run | str]) -> AcceptanceStats:
    """Acceptance in steps of our own, or as a server counted it."""
    runs = runs_of(rows)
    counted = (run.counted for run in runs if run.counted)
    return sum(counted, AcceptanceStats.from_records(records_of(runs)))


def decode_speed(run: Run) -> float:
    """Tokens/s after the first chunk; nan without a later token."""
    later = len(run.tokens) - run.num_first
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def typical(values: Iterable[float]) -> float | None:
    """The median; None without a value."""
    finite = [value for value in values if np.isfinite(value)]
    return median(finite) if finite else None


def over_requests(table: Table, measure: Measure, wanted: Sequence[int]) -> dict[str, float]:
    """Percentiles over requests of the median of their repeats."""
    medians = [typical(map(measure, runs_of(row))) for row in table]
    return stats.percentiles([value for value in medians if value is not None], wanted)


def decode_work(table: Table) -> list[Work | None]:
    """Tokens after the first chunk of each request, and their seconds."""
    return _work(table, lambda run: len(run.tokens) - run.num_first, decode_speed)


def _work(table: Table, tokens: Measure, speed: Measure) -> list[Work | None]:
    """A request's mean tokens at its median speed: one slow repeat moves nothing."""
    found: list[Work | None] = []
    for runs in map(runs_of, table):
        rate = typical(map(speed, runs))
        count = mean(map(tokens, runs)) if runs else 0
        found.append(Work(count, count / rate) if rate else None)
    return found


def paired_ratios(table: Table, baseline: Table) -> list[float | None]:
    """Each request's median of the ratios of decode speeds, paired within each repeat."""
    return [
        typical(
            decode_speed(a) / decode_speed(b)
            for a, b in zip(ours, theirs, strict=True)
            if isinstance(a, Run) and isinstance(b, Run)
        )
        for ours, theirs in zip(table, baseline, strict=True)
    ]


def step_times(records: Sequence[StepRecord]) -> StepTimes:
    """Seconds by part of the step; a batch's time counts once, not once a row."""
    parts = {
        part: sum(getattr(record, f"{part}_s") / record.batch_size for record in records)
        for part in ("draft", "target", "verify", "commit", "wall")
    }
    return StepTimes(**parts, other=2 * parts["wall"] - sum(parts.values()))


def speeds(table: Table, baselines: Mapping[str, Table]) -> dict[str, Any]:
    """Tau, decode speed, and `speedup_vs_NAME` of each baseline, with their intervals."""
    whole, work = acceptance(chain(*table)), decode_work(table)
    found = {
        "tau": whole.accepted_length if whole.num_steps else None,
        "tau_ci": stats.tau_interval(map(acceptance, table)),
        **stats.total_speed("decode_tokens_per_s", [work]),
    }
    for name, baseline in baselines.items():
        found |= stats.total_speed(f"speedup_vs_{name}", [work], [decode_work(baseline)])
    return found


def arm_figures(
    table: Table, baselines: Mapping[str, Table], wanted: Sequence[int], has_queue: bool
) -> dict[str, Any]:
    """Figures that every arm has; what a request waits in the queue counts or does not."""

    def ttft_s(run: Run) -> float:
        return run.queue_s * has_queue + run.ttft_s

    def whole_speed(run: Run) -> float:
        return len(run.tokens) / (ttft_s(run) + run.decode_s)

    plain, records = baselines["plain"], records_of(chain(*table))
    accepted, times = acceptance(chain(*table)), step_times(records)
    ratios = [ratio for ratio in paired_ratios(table, plain) if ratio is not None]
    whole = [_work(each, lambda run: len(run.tokens), whole_speed) for each in (table, plain)]
    return {
        **speeds(table, baselines),
        "mean_speedup_vs_plain": float(np.mean(ratios)) if ratios else None,
        **stats.total_speed("end_to_end_speedup_vs_plain", whole[:1], whole[1:]),
        "acceptance_rate": accepted.acceptance_rate if accepted.num_steps else None,
        "per_depth": list(accepted.acceptance_at_depth),
        "per_depth_conditional": list(accepted.conditional_acceptance_at_depth),
        "loop_efficiency": (times.draft + times.target) / times.wall if times.wall else None,
        "time_s": times,
        "ttft_s": over_requests(table, ttft_s, wanted),
        "itl_s": over_requests(table, lambda run: 1 / decode_speed(run), wanted),
        "tokens": sum(len(run.tokens) for run in runs_of(row[0] for row in table)),
        "failed": sum(len(runs_of(row)) < len(row) for row in table),
    }


def largest_memory(calls: Collection[Call]) -> Memory:
    def largest(kind: str) -> int | None:
        found = (getattr(call.memory, kind) for call in calls)
        return max((size for size in found if size is not None), default=None)

    return Memory(**{kind: largest(kind) for kind in Memory.model_fields})


def load_figures(requests: Sequence[Request], calls: Sequence[Call], plain: Sequence[Call]) -> Load:
    """Throughput, what a user gets, and fairness: of users at the same time, a call a repeat."""
    whole = [call.runs for call in calls if call.wall_s]
    pairs = [(a.runs, b.runs) for a, b in zip(calls, plain, strict=True) if a.wall_s and b.wall_s]
    users = sorted({request.user for request in requests})
    places = [[i for i, each in enumerate(requests) if each.user == user] for user in users]
    works = [[_waited([runs[i] for i in own]) for runs in whole] for own in places]
    by_user = [typical(work.tokens / work.seconds for work in each) for each in works]
    known = [speed for speed in by_user if speed is not None]
    totals = [_throughput(runs) for runs in whole]
    ratios = [_throughput(ours) / _throughput(theirs) for ours, theirs in pairs]
    ours, theirs = (
        [_waited(repeats) for repeats in zip(*(pair[arm] for pair in pairs), strict=True)]
        for arm in (0, 1)
    )
    return Load(
        users=len(users),
        tokens_per_s=typical(totals),
        tokens_per_s_range=(min(totals), max(totals)) if totals else None,
        full_load_tokens_per_s=typical(_full_load(runs, places) for runs in whole),
        tokens_per_s_vs_plain=typical(ratios),
        tokens_per_s_vs_plain_range=(min(ratios), max(ratios)) if ratios else None,
        user_tokens_per_s=by_user,
        user_tokens_per_s_mean=float(np.mean(known)) if known else None,
        user_tokens_per_s_mean_ci=stats.bootstrap_interval((np.array(known),), np.mean),
        **stats.total_speed("user_speed_vs_plain", [ours], [theirs]),
        jain_index=stats.jain_index(known) if known else None,
        worst_over_mean=stats.worst_over_mean(known) if known else None,
    )


def _waited(runs: Sequence[Run]) -> Work:
    """Tokens and the seconds waited for them, queue and prefill included."""
    return Work(sum(len(run.tokens) for run in runs), sum(run.waited_s for run in runs))


def _throughput(runs: Sequence[Run]) -> float:
    """Tokens of all users a second, from the start to the last chunk."""
    return sum(len(run.tokens) for run in runs) / max(run.chunk_s[-1] for run in runs)


def _full_load(runs: Sequence[Run], places: Sequence[Sequence[int]]) -> float:
    """The same until the first user has nothing left to ask: before the batch runs empty."""
    until = min(max(runs[i].chunk_s[-1] for i in own) for own in places)
    chunks = chain(*(zip(run.chunk_s, run.chunk_tokens, strict=True) for run in runs))
    return sum(count for when, count in chunks if when <= until) / until
