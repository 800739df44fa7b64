"""From calls to the figures of `suite.json`; definitions stand in docs/suites.md."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from specdec.bench.runner import fingerprint_of_ids
from specdec.bench.store import Key, Run
from specdec.bench.suites.store import Call, Served
from specdec.bench.summary import (
    LogitGaps,
    Work,
    decode_work,
    end_to_end_work,
    loop_efficiency,
    mean_ratio,
    medians,
    parting,
    peak_memory,
    present,
    seconds_per_token,
    time_s,
    total_speed,
)
from specdec.bench.workloads import Ask, Group
from specdec.common.stats import (
    Interval,
    bootstrap_interval,
    jain_index,
    percentiles,
    tau_interval,
    worst_over_mean,
)
from specdec.engine.metrics import AcceptanceStats

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


_WANTED = (50, 95, 99)
Rows_of_summary = list[list[Served | None]]  # [request][repeat]; None where the call failed
Calls = list[list[Call]]  # [call][repeat]


def calls_of(group: Group, first: int, arm: str, done: dict[Key, Call], repeats: int) -> Calls:
    """The calls of one arm in one group.

    Args:
        group: whose calls.
        first: the number of its first call in the suite.
        arm: its name.
        done: all calls.
        repeats: of each.
    """
    numbers = range(first, first + len(group.calls))
    return [[done[(repeat, number, arm)] for repeat in range(repeats)] for number in numbers]


def rows_of(group: Group, calls: Calls) -> Rows_of_summary:
    """What each request of a group gave."""
    return [
        [_whole(call.rows[place]) for call in repeats]
        for asks, repeats in zip(group.calls, calls, strict=True)
        for place in range(len(asks))
    ]


def _whole(row: Served | str) -> Served | None:
    return None if isinstance(row, str) else row


def describe(group: Group) -> dict[str, Any]:
    """A group without its results: what was asked."""
    return {
        "name": group.name,
        "value": group.value,
        "requests": [_request(ask) for ask in group.asks],
    }


def _request(ask: Ask) -> dict[str, Any]:
    return {
        "id": ask.id,
        "domain": ask.domain,
        "user": ask.user,
        "num_tokens": len(ask.prompt),
        "max_new_tokens": ask.max_new_tokens,
        "arrival_s": ask.arrival_s,
        "fingerprint": fingerprint_of_ids(ask.prompt),
    }


def summarise(
    name: str,
    group: Group,
    calls: Calls,
    plain: Calls,
    differences: list[dict[str, Any]] | None,
    has_load: bool,
) -> dict[str, Any]:
    """The figures of one arm in one group.

    Args:
        name: of the arm.
        group: what was asked.
        calls: what the arm gave.
        plain: what plain decoding gave.
        differences: requests whose greedy tokens are not plain's; None when sampling.
        has_load: whether all requests of a repeat are one call of several users.
    """
    rows = rows_of(group, calls)
    served = [row for each in rows for row in each if row is not None]
    flat = [call for repeats in calls for call in repeats]
    return {
        "name": name,
        **_acceptance(rows, served),
        **_speeds(rows, rows_of(group, plain)),
        **_waits(rows, served),
        "requests": len(rows),
        "tokens": sum(len(each[0].tokens) for each in rows if each[0] is not None),
        "failed": sum(any(row is None for row in each) for each in rows),
        "failures": _failures(group, calls),
        "mismatches": None if differences is None else len(differences),
        "differences": differences or [],
        "memory": peak_memory(flat),
        "power": _power(flat),
        "load": load_figures(group.asks, calls[0], plain[0]) if has_load else None,
    }


def _waits(rows: Rows_of_summary, served: list[Served]) -> dict[str, dict[str, float]]:
    """Percentiles over requests of the median of their repeats; of gaps, over all there were."""
    by_request: dict[str, Callable[[Served], float]] = {
        "ttft_s": lambda row: row.run.ttft_s,
        "itl_s": lambda row: seconds_per_token(row.run),
        "queue_s": lambda row: row.queue_s,
        "latency_s": lambda row: row.end_s - row.sent_s,
    }
    gaps = [gap for row in served for gap in row.gaps_s]
    return {
        **{key: percentiles(present(medians(rows, of)), _WANTED) for key, of in by_request.items()},
        "chunk_gap_s": percentiles(gaps, _WANTED),
    }


def _acceptance(rows: Rows_of_summary, served: list[Served]) -> dict[str, Any]:
    records = [record for row in served for record in row.records]
    stats = AcceptanceStats.from_records(records)
    by_request = [
        AcceptanceStats.from_records(r for row in each if row is not None for r in row.records)
        for each in rows
    ]
    return {
        "tau": stats.accepted_length if records else None,
        "tau_ci": tau_interval(by_request),
        "acceptance_rate": stats.acceptance_rate if records else None,
        "per_depth": list(stats.acceptance_at_depth),
        "per_depth_conditional": list(stats.conditional_acceptance_at_depth),
        "loop_efficiency": loop_efficiency(records),
        "time_s": time_s(records),
    }


def _speeds(rows: Rows_of_summary, plain: Rows_of_summary) -> dict[str, Any]:
    table, baseline = _runs(rows), _runs(plain)
    decoding = [decode_work(each) for each in (table, baseline)]
    whole = [end_to_end_work(each) for each in (table, baseline)]
    return {
        **total_speed("decode_tokens_per_s", decoding[:1]),
        **total_speed("speedup_vs_plain", decoding[:1], decoding[1:]),
        "mean_speedup_vs_plain": mean_ratio(table, baseline),
        **total_speed("end_to_end_speedup_vs_plain", whole[:1], whole[1:]),
    }


def _runs(rows: Rows_of_summary) -> list[list[Run | None]]:
    return [[None if row is None else row.run for row in each] for each in rows]


def _failures(group: Group, calls: Calls) -> list[dict[str, Any]]:
    """Requests that failed, with the reason, in each repeat."""
    return [
        {"request": ask.id, "repeat": repeat, "reason": row}
        for asks, repeats in zip(group.calls, calls, strict=True)
        for repeat, call in enumerate(repeats)
        for ask, row in zip(asks, call.rows, strict=True)
        if isinstance(row, str)
    ]


def _power(calls: Iterable[Call]) -> dict[str, float | None]:
    """Energy of the calls that were measured, over their seconds and over their tokens."""
    measured = [call for call in calls if call.power.energy_j is not None and call.wall_s]
    energy_j = sum(call.power.energy_j or 0.0 for call in measured)
    seconds = sum(call.wall_s or 0.0 for call in measured)
    tokens = sum(len(row.tokens) for call in measured for row in call.served)
    return {
        "energy_j": energy_j if measured else None,
        "power_w": energy_j / seconds if measured else None,
        "energy_j_per_token": energy_j / tokens if tokens else None,
    }


def differences(group: Group, calls: Calls, plain: Calls, gaps: LogitGaps) -> list[dict[str, Any]]:
    """Requests whose greedy tokens are not plain decoding's, with the first place of parting.

    Args:
        group: what was asked.
        calls: what an arm gave.
        plain: what plain decoding gave.
        gaps: measures how close the target's choice was there.

    Returns:
        A dictionary a request: `request`, `position` (of the first output token that differs) and
        `top2_gap` (of the logits there; None where one token alone is allowed).
    """
    found = []
    for ask, ours, theirs in zip(
        group.asks, rows_of(group, calls), rows_of(group, plain), strict=True
    ):
        position = _position(ours, theirs)
        if position is not None:
            where, prefix = position
            gap = gaps.at(tuple(ask.prompt), prefix)
            found.append({"request": ask.id, "position": where, "top2_gap": gap})
    return found


def _position(
    ours: Sequence[Served | None], theirs: Sequence[Served | None]
) -> tuple[int, tuple[int, ...]] | None:
    """Where two outputs of one request part first, and the tokens before; None if none do."""
    for one in ours:
        for other in theirs:
            if one and other and one.tokens != other.tokens:
                where = parting(one.tokens, other.tokens)
                return where, tuple(one.tokens[:where])
    return None
