"""What users at the same time got: throughput, speed of each user, fairness."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from specdec.bench.interval import Interval, bootstrap_interval
from specdec.bench.speed import Work, total_speed
from specdec.bench.suites.ask import Ask
from specdec.bench.suites.fairness import jain_index, worst_over_mean
from specdec.bench.suites.served import Call, Served

Rows = Sequence[Served]


def load_figures(
    asks: Sequence[Ask], calls: Sequence[Call], plain: Sequence[Call]
) -> dict[str, Any]:
    """Figures of one arm at one number of users.

    Args:
        asks: the requests.
        calls: what the arm gave, a call a repeat.
        plain: the same of plain decoding.
    """
    users = sorted({ask.user for ask in asks})
    whole = [call for call in calls if call.wall_s]
    pairs = [(a, b) for a, b in zip(calls, plain, strict=True) if a.wall_s and b.wall_s]
    speeds = [_user_speed(user, asks, whole) for user in users]
    known = [speed for speed in speeds if speed is not None]
    ratios = [_throughput(ours) / _throughput(theirs) for ours, theirs in pairs]
    totals = [_throughput(call) for call in whole]
    full = [_full_load(asks, call.served) for call in whole]
    return {
        "users": len(users),
        "tokens_per_s": _median(totals),
        "tokens_per_s_range": _range(totals),
        "full_load_tokens_per_s": _median(full),
        "tokens_per_s_vs_plain": _median(ratios),
        "tokens_per_s_vs_plain_range": _range(ratios),
        "user_tokens_per_s": speeds,
        "user_tokens_per_s_mean": float(np.mean(known)) if known else None,
        "user_tokens_per_s_mean_ci": _mean_interval(known),
        **_user_speed_vs_plain(pairs),
        "jain_index": jain_index(known) if known else None,
        "worst_over_mean": worst_over_mean(known) if known else None,
    }


def _throughput(call: Call) -> float:
    """Tokens of all users a second, from the start to the last chunk."""
    assert call.wall_s is not None
    return sum(len(row.tokens) for row in call.served) / call.wall_s


def _full_load(asks: Sequence[Ask], rows: Rows) -> float:
    """The same until the first user has nothing left to ask: before the batch runs empty."""
    ends: dict[int, float] = {}
    for ask, row in zip(asks, rows, strict=True):
        ends[ask.user] = max(ends.get(ask.user, 0.0), row.end_s)
    until = min(ends.values())
    tokens = sum(
        count
        for row in rows
        for when, count in zip(row.chunk_s, row.chunk_tokens, strict=True)
        if when <= until
    )
    return tokens / until


def _user_speed(user: int, asks: Sequence[Ask], calls: Sequence[Call]) -> float | None:
    """Tokens of a user over the seconds waited for them; the median over the repeats."""
    speeds = []
    for call in calls:
        rows = [row for ask, row in zip(asks, call.served, strict=True) if ask.user == user]
        speeds.append(sum(len(row.tokens) for row in rows) / sum(map(_waited, rows)))
    return _median(speeds)


def _waited(row: Served) -> float:
    """From sending a request to its last chunk: queue and prefill included."""
    return row.end_s - row.sent_s


def _user_speed_vs_plain(pairs: Sequence[tuple[Call, Call]]) -> dict[str, Any]:
    """Tokens a second of waiting over the same of plain decoding; interval over requests."""
    works = [
        [_waited_for(row) for row in zip(*(pair[arm].served for pair in pairs), strict=True)]
        for arm in (0, 1)
    ]
    return total_speed("user_speed_vs_plain", works[:1], works[1:])


def _waited_for(repeats: Rows) -> Work:
    """A request's tokens and the seconds waited for them, over its repeats."""
    return Work(sum(len(row.tokens) for row in repeats), sum(map(_waited, repeats)))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _range(values: Sequence[float]) -> Interval:
    return (min(values), max(values)) if values else None


def _mean_interval(values: list[float]) -> Interval:
    return bootstrap_interval((np.array(values),), lambda x, axis: x.mean(axis=axis))
