"""Figures of users at the same time: throughput, what a user gets, and fairness."""

from collections.abc import Sequence
from statistics import median

import numpy as np

from specdec.bench.results import Load
from specdec.bench.store import Call, Run
from specdec.bench.workloads import Request
from specdec.common.stats import (
    Work,
    bootstrap_interval,
    jain_index,
    total_speed,
    worst_over_mean,
)


def load_figures(requests: Sequence[Request], calls: Sequence[Call], plain: Sequence[Call]) -> Load:
    """Figures of one arm at one number of users.

    Args:
        requests: requests of the call.
        calls: calls of the arm, one a repeat.
        plain: the same of plain decoding.
    """
    users = sorted({request.user for request in requests})
    whole = [call.runs for call in calls if call.wall_s]
    pairs = [(a.runs, b.runs) for a, b in zip(calls, plain, strict=True) if a.wall_s and b.wall_s]
    speeds = [_user_speed(user, requests, whole) for user in users]
    known = [speed for speed in speeds if speed is not None]
    totals = [_throughput(runs) for runs in whole]
    ratios = [_throughput(ours) / _throughput(theirs) for ours, theirs in pairs]
    works = [
        [_work_of_repeats(repeats) for repeats in zip(*(pair[arm] for pair in pairs), strict=True)]
        for arm in (0, 1)
    ]
    mean_ci = bootstrap_interval((np.array(known),), lambda x, axis: x.mean(axis=axis))
    return Load(
        users=len(users),
        tokens_per_s=_median(totals),
        tokens_per_s_range=_range(totals),
        full_load_tokens_per_s=_median([_full_load(requests, runs) for runs in whole]),
        tokens_per_s_vs_plain=_median(ratios),
        tokens_per_s_vs_plain_range=_range(ratios),
        user_tokens_per_s=speeds,
        user_tokens_per_s_mean=float(np.mean(known)) if known else None,
        user_tokens_per_s_mean_ci=mean_ci,
        **total_speed("user_speed_vs_plain", works[:1], works[1:]),
        jain_index=jain_index(known) if known else None,
        worst_over_mean=worst_over_mean(known) if known else None,
    )


def _throughput(runs: Sequence[Run]) -> float:
    """Tokens of all users a second, from the start to the last chunk."""
    return sum(len(run.tokens) for run in runs) / max(run.chunk_s[-1] for run in runs)


def _full_load(requests: Sequence[Request], runs: Sequence[Run]) -> float:
    """The same until the first user has nothing left to ask: before the batch runs empty."""
    ends: dict[int, float] = {}
    for request, run in zip(requests, runs, strict=True):
        ends[request.user] = max(ends.get(request.user, 0.0), run.chunk_s[-1])
    until = min(ends.values())
    tokens = sum(
        count
        for run in runs
        for when, count in zip(run.chunk_s, run.chunk_tokens, strict=True)
        if when <= until
    )
    return tokens / until


def _user_speed(
    user: int, requests: Sequence[Request], calls: Sequence[Sequence[Run]]
) -> float | None:
    """Tokens of a user over the seconds waited for them; the median over the repeats."""
    works = [
        _work_of_repeats(
            [run for each, run in zip(requests, runs, strict=True) if each.user == user]
        )
        for runs in calls
    ]
    return _median([work.tokens / work.seconds for work in works])


def _work_of_repeats(runs: Sequence[Run]) -> Work:
    """Tokens and the seconds waited for them, queue and prefill included."""
    return Work(sum(len(run.tokens) for run in runs), sum(run.waited_s for run in runs))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None
