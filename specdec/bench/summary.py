"""From runs to the figures of `results.json`; definitions stand in `specdec.metrics`."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from statistics import median
from typing import Any

import numpy as np

from specdec.bench.config import BenchConfig
from specdec.bench.differences import Table
from specdec.bench.interval import Interval, bootstrap_interval, tau_interval
from specdec.bench.outcome import Key, Memory, Outcome, Run
from specdec.metrics import AcceptanceStats, StepRecord


def summarise(
    config: BenchConfig, tables: dict[str, Table], differences: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """One dictionary an arm, in the order of the tables."""
    greedy = config.sampling.temperature == 0
    return [
        {
            **_arm(name, tables, config),
            "mismatches": len(differences[name]) if greedy else None,
            "differences": differences[name],
        }
        for name in tables
    ]


def tabulate(
    config: BenchConfig, done: dict[Key, Outcome], names: list[str], num_prompts: int
) -> dict[str, Table]:
    """Runs of every arm [prompt][repeat]; None where one failed."""
    size = config.call_size
    tables: dict[str, Table] = {}
    for name in names:
        rows = [
            [
                done[(repeat, prompt // size, name)].rows[prompt % size]
                for prompt in range(num_prompts)
            ]
            for repeat in range(config.repeats)
        ]
        tables[name] = [
            [run if isinstance(run, Run) else None for run in row]
            for row in zip(*rows, strict=True)
        ]
    return tables


def failures(config: BenchConfig, done: dict[Key, Outcome], name: str) -> list[dict[str, Any]]:
    """Prompts that an arm failed on, with the reason, in each repeat."""
    return [
        {"prompt": call * config.call_size + place, "repeat": repeat, "reason": row}
        for (repeat, call, arm), outcome in sorted(done.items())
        if arm == name
        for place, row in enumerate(outcome.rows)
        if isinstance(row, str)
    ]


def peak_memory(outcomes: Iterable[Outcome]) -> dict[str, int | None]:
    """The largest figure of each kind; None where none was taken."""
    memories = [outcome.memory for outcome in outcomes]
    peaks: dict[str, int | None] = {}
    for item in fields(Memory):
        values = [getattr(memory, item.name) for memory in memories]
        peaks[item.name] = max((value for value in values if value is not None), default=None)
    return peaks


def throughput(outcomes: Iterable[Outcome], batch_size: int) -> dict[str, float | None]:
    """Tokens of all rows a second: over whole calls, prefills included, and while decoding.

    Calls with a failed prompt are left out.
    """
    timed = [(outcome.runs, outcome.wall_s) for outcome in outcomes if outcome.wall_s]
    tokens = sum(len(run.tokens) for runs, _ in timed for run in runs)
    later = sum(len(run.tokens) - run.num_first for runs, _ in timed for run in runs)
    decoding = sum(_decoding_s(runs, batch_size) for runs, _ in timed)
    return {
        "batch_tokens_per_s": tokens / sum(wall_s for _, wall_s in timed) if timed else None,
        "batch_decode_tokens_per_s": later / decoding if decoding else None,
    }


def _decoding_s(runs: list[Run], batch_size: int) -> float:
    """Seconds of a call's decode steps; without records, of its batches' first to last chunks."""
    records = [record for run in runs for record in run.records]
    if records:
        return _times(records)["wall"]
    batches = [runs[first : first + batch_size] for first in range(0, len(runs), batch_size)]
    return sum(max(run.decode_s for run in batch) for batch in batches)


def _arm(name: str, tables: dict[str, Table], config: BenchConfig) -> dict[str, Any]:
    table = tables[name]
    runs = [run for row in table for run in row if run is not None]
    records = [record for run in runs for record in run.records]
    stats = AcceptanceStats.from_records(records)
    tau = stats.accepted_length
    if abs(1 + sum(stats.acceptance_at_depth) - tau) > 1e-9:
        raise AssertionError(f"arm {name}: 1 + the sum over depths is not tau")
    speeds = _medians(table, _speed)
    steps = records if records else None
    return {
        "name": name,
        "tau": tau if steps else None,
        "tau_ci": _tau_interval(table) if steps else None,
        "acceptance_rate": stats.acceptance_rate if steps else None,
        "per_depth": list(stats.acceptance_at_depth),
        "per_depth_conditional": list(stats.conditional_acceptance_at_depth),
        "decode_tokens_per_s": _mean(speeds),
        "decode_tokens_per_s_ci": _mean_interval(speeds),
        **_speedup("speedup_vs_plain", table, tables["plain"], _speed),
        **_speedup("speedup_vs_hf", table, tables["hf_generate"], _speed),
        **_speedup("end_to_end_speedup_vs_plain", table, tables["plain"], _end_to_end_speed),
        "ttft_s": _percentiles([run.ttft_s for run in runs]),
        "itl_s": _percentiles([1 / speed for speed in speeds]),
        "loop_efficiency": _efficiency(records),
        "time_s": _times(records),
        "other_ms_per_step": _other_ms(records),
        "failed": sum(any(run is None for run in row) for row in table),
        "prompts": len(table),
        "tokens": sum(len(row[0].tokens) for row in table if row[0] is not None),
    }


def _speed(run: Run) -> float:
    """Decode speed, tokens/s: the first chunk is prefill's."""
    later = len(run.tokens) - run.num_first
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def _end_to_end_speed(run: Run) -> float:
    return len(run.tokens) / (run.ttft_s + run.decode_s)


def _medians(table: Table, of: Callable[[Run], float]) -> list[float]:
    """Each prompt's median over its repeats; prompts that failed or have no value are left out."""
    rows = [[of(run) for run in row if run is not None] for row in table]
    values = [median(row) for row in rows if row]
    return [value for value in values if np.isfinite(value)]


def _speedup(
    key: str,
    table: Table,
    baseline: Table,
    of: Callable[[Run], float],
) -> dict[str, Any]:
    """Mean over prompts of the ratio of speeds, paired within each repeat."""
    ratios = []
    for ours, theirs in zip(table, baseline, strict=True):
        pairs = [
            of(a) / of(b)
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        ]
        finite = [ratio for ratio in pairs if np.isfinite(ratio)]
        if finite:
            ratios.append(median(finite))
    return {key: _mean(ratios), f"{key}_ci": _mean_interval(ratios)}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _mean_interval(values: list[float]) -> Interval:
    return bootstrap_interval((np.array(values),), lambda x, axis: x.mean(axis=axis))


def _tau_interval(table: Table) -> Interval:
    return tau_interval(
        AcceptanceStats.from_records(r for run in row if run is not None for r in run.records)
        for row in table
    )


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}


def _shared(record: StepRecord) -> float:
    """A batch's time counts once, not once a row."""
    return 1 / record.batch_size


def _times(records: list[StepRecord]) -> dict[str, float]:
    draft = sum(r.draft_s * _shared(r) for r in records)
    target = sum(r.target_s * _shared(r) for r in records)
    wall = sum(r.wall_s * _shared(r) for r in records)
    return {"draft": draft, "target": target, "other": wall - draft - target, "wall": wall}


def _efficiency(records: list[StepRecord]) -> float | None:
    times = _times(records)
    return (times["draft"] + times["target"]) / times["wall"] if times["wall"] else None


def _other_ms(records: list[StepRecord]) -> float | None:
    """Median time in neither model per target step, ms."""
    gaps = [r.wall_s - r.draft_s - r.target_s for r in records]
    return 1000 * median(gaps) if gaps else None
