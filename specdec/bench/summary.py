"""From runs to the figures of `results.json`; definitions stand in `specdec.metrics`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Protocol

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.differences import BASELINES
from specdec.bench.interval import tau_interval
from specdec.bench.outcome import Key, Memory, Outcome, Run, Table
from specdec.bench.percentiles import percentiles
from specdec.bench.speed import (
    Values,
    decode_speed,
    decode_work,
    end_to_end_work,
    mean_ratio,
    medians,
    paired_ratios,
    present,
    seconds_per_token,
    total_speed,
)
from specdec.bench.times import loop_efficiency, other_ms_per_step, time_s
from specdec.metrics import AcceptanceStats, StepRecord


def summarise(
    config: BenchConfig,
    tables: dict[str, Table],
    differences: dict[str, list[dict[str, Any]]],
    domains: Sequence[str],
    eos_token_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """One dictionary an arm, in the order of the tables.

    Args:
        config: of the bench.
        tables: runs of every arm.
        differences: see `find_differences`.
        domains: of the prompts.
        eos_token_ids: of the target; an answer that ends with none was cut at its length.
    """
    greedy = config.sampling.temperature == 0
    configs = {arm.name: arm for arm in (*map(_baseline, BASELINES), *config.arms)}
    return [
        {
            "name": name,
            "type": configs[name].type,
            "options": configs[name].options,
            "draft_length": configs[name].draft_length,
            **_figures(name, tables),
            "domains": _domains(name, tables, domains),
            "per_prompt": _per_prompt(tables[name], tables["plain"], eos_token_ids),
            "finish": _finishes(tables[name], eos_token_ids),
            "mismatches": len(differences[name]) if greedy else None,
            "differences": differences[name],
        }
        for name in tables
    ]


def _baseline(name: str) -> ArmConfig:
    return ArmConfig(name, name)


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


class Measured(Protocol):
    """Anything that knows its memory: a call of a bench or of a suite."""

    @property
    def memory(self) -> Memory:
        """As the call left it."""


def peak_memory(outcomes: Iterable[Measured]) -> dict[str, int | None]:
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
    records = _records([runs])
    if records:
        return time_s(records)["wall"]
    batches = [runs[first : first + batch_size] for first in range(0, len(runs), batch_size)]
    return sum(max(run.decode_s for run in batch) for batch in batches)


def _figures(name: str, tables: dict[str, Table]) -> dict[str, Any]:
    table = tables[name]
    records = _records(table)
    stats = AcceptanceStats.from_records(records)
    if abs(1 + sum(stats.acceptance_at_depth) - stats.accepted_length) > 1e-9:
        raise AssertionError(f"arm {name}: 1 + the sum over depths is not tau")
    both = end_to_end_work(table), end_to_end_work(tables["plain"])
    return {
        **_headline(name, tables),
        "mean_speedup_vs_plain": mean_ratio(table, tables["plain"]),
        "acceptance_rate": stats.acceptance_rate if records else None,
        "per_depth": list(stats.acceptance_at_depth),
        "per_depth_conditional": list(stats.conditional_acceptance_at_depth),
        **total_speed("end_to_end_speedup_vs_plain", both[:1], both[1:]),
        "ttft_s": _percentiles(medians(table, lambda run: run.ttft_s)),
        "itl_s": _percentiles(medians(table, seconds_per_token)),
        "loop_efficiency": loop_efficiency(records),
        "time_s": time_s(records),
        "other_ms_per_step": other_ms_per_step(records),
        "failed": sum(any(run is None for run in row) for row in table),
        "prompts": len(table),
        "tokens": sum(len(row[0].tokens) for row in table if row[0] is not None),
    }


def _headline(name: str, tables: dict[str, Table]) -> dict[str, Any]:
    """Tau and speeds with their intervals, of the arm `name`."""
    table = tables[name]
    records, own = _records(table), decode_work(table)
    return {
        "tau": AcceptanceStats.from_records(records).accepted_length if records else None,
        "tau_ci": tau_interval(_stats(row) for row in table) if records else None,
        **total_speed("decode_tokens_per_s", [own]),
        **total_speed("speedup_vs_plain", [own], [decode_work(tables["plain"])]),
        **total_speed("speedup_vs_hf", [own], [decode_work(tables["hf_generate"])]),
    }


def _domains(name: str, tables: dict[str, Table], domains: Sequence[str]) -> dict[str, Any]:
    """The headline of every domain, in the order in which they first appear."""
    found = {}
    for domain in dict.fromkeys(domains):
        rows = [place for place, each in enumerate(domains) if each == domain]
        kept = {arm: [tables[arm][row] for row in rows] for arm in (name, *BASELINES)}
        found[domain] = {"prompts": len(rows), **_headline(name, kept)}
    return found


def _per_prompt(
    table: Table, plain: Table, eos_token_ids: Sequence[int]
) -> list[dict[str, Any] | None]:
    """What each prompt gave, sums over its repeats; None for one that always failed."""
    works, ratios = decode_work(table), paired_ratios(table, plain, decode_speed)
    found: list[dict[str, Any] | None] = []
    for row, work, ratio in zip(table, works, ratios, strict=True):
        runs = [run for run in row if run is not None]
        stats = _stats(row)
        figures = {
            "steps": stats.num_steps,
            "drafted": stats.num_drafted,
            "accepted": stats.num_accepted,
            "tokens": sum(len(run.tokens) for run in runs),
            "tau": stats.accepted_length if stats.num_steps else None,
            "decode_tokens": work and work.tokens,
            "decode_s": work and work.seconds,
            "decode_tokens_per_s": work and work.tokens / work.seconds,
            "speedup_vs_plain": ratio,
            "finish": _finish(runs[0], eos_token_ids) if runs else None,
        }
        found.append(figures if runs else None)
    return found


def _finishes(table: Table, eos_token_ids: Sequence[int]) -> dict[str, int]:
    runs = [run for row in table for run in row[:1] if run is not None]
    counts = Counter(_finish(run, eos_token_ids) for run in runs)
    return {reason: counts[reason] for reason in ("eos", "length")}


def _finish(run: Run, eos_token_ids: Sequence[int]) -> str:
    return "eos" if run.tokens[-1] in eos_token_ids else "length"


def _records(table: Sequence[Sequence[Run | None]]) -> list[StepRecord]:
    return [record for row in table for run in row if run is not None for record in run.records]


def _stats(row: Sequence[Run | None]) -> AcceptanceStats:
    return AcceptanceStats.from_records(_records([row]))


def _percentiles(values: Values) -> dict[str, float]:
    """Over prompts; empty where none has a value."""
    return percentiles(present(values), (50, 90, 99))
