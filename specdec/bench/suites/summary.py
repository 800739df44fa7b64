"""From calls to the figures of `suite.json`; definitions stand in docs/suites.md."""

from collections.abc import Callable, Iterable
from typing import Any

from specdec.bench.interval import tau_interval
from specdec.bench.outcome import Key, Run
from specdec.bench.percentiles import percentiles
from specdec.bench.provenance import fingerprint_of_ids
from specdec.bench.speed import (
    decode_work,
    end_to_end_work,
    mean_ratio,
    medians,
    present,
    seconds_per_token,
    total_speed,
)
from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.load import load_figures
from specdec.bench.suites.served import Call, Served
from specdec.bench.summary import peak_memory
from specdec.bench.times import loop_efficiency, time_s
from specdec.metrics import AcceptanceStats

_WANTED = (50, 95, 99)
Rows = list[list[Served | None]]  # [request][repeat]; None where the call failed
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


def rows_of(group: Group, calls: Calls) -> Rows:
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


def _waits(rows: Rows, served: list[Served]) -> dict[str, dict[str, float]]:
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


def _acceptance(rows: Rows, served: list[Served]) -> dict[str, Any]:
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


def _speeds(rows: Rows, plain: Rows) -> dict[str, Any]:
    table, baseline = _runs(rows), _runs(plain)
    decoding = [decode_work(each) for each in (table, baseline)]
    whole = [end_to_end_work(each) for each in (table, baseline)]
    return {
        **total_speed("decode_tokens_per_s", decoding[:1]),
        **total_speed("speedup_vs_plain", decoding[:1], decoding[1:]),
        "mean_speedup_vs_plain": mean_ratio(table, baseline),
        **total_speed("end_to_end_speedup_vs_plain", whole[:1], whole[1:]),
    }


def _runs(rows: Rows) -> list[list[Run | None]]:
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
