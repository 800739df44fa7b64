"""From runs to the figures of `results.json`; definitions stand in `specdec.engine.metrics`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.store import Key, Memory, Outcome, Run, Table
from specdec.common.stats import bootstrap_interval, percentiles, tau_interval
from specdec.engine.interfaces import claimed
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.targets.hf import HFTarget

BASELINES = ("plain", "hf_generate")


def find_differences(
    config: BenchConfig, tables: dict[str, Table], target: HFTarget, ids: Sequence[list[int]]
) -> dict[str, list[dict[str, Any]]]:
    """Per arm, the prompts whose greedy tokens differ from a baseline's; none when sampling.

    Half precision rounds differently in batches of other shapes, so that near ties may fall the
    other way: the gap between the two best logits at the first difference says whether it was one.

    Args:
        config: of the bench.
        tables: runs of every arm.
        target: computes the logits.
        ids: the prompts.

    Returns:
        Arm -> a dictionary a prompt: `prompt` (its number), `against` (the baseline), `position`
        (of the first output token that differs) and `top2_gap` (of the logits there; None where the
        sampling settings leave a single token).
    """
    if config.sampling.temperature > 0:
        return {name: [] for name in tables}
    gaps = LogitGaps(SamplingConfig(**vars(config.sampling)), target)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, table in tables.items():
        found[name] = []
        for prompt, runs in enumerate(table):
            against, position, prefix = _first_difference(runs, tables, prompt)
            if against:
                gap = gaps.at(tuple(ids[prompt]), prefix)
                where = {"prompt": prompt, "against": against, "position": position}
                found[name].append({**where, "top2_gap": gap})
    return found


def _first_difference(
    runs: list[Run | None], tables: dict[str, Table], prompt: int
) -> tuple[str, int, tuple[int, ...]]:
    """The baseline that differs first, where, and the tokens before; "" if none does."""
    for baseline in BASELINES:
        for ours in runs:
            for theirs in tables[baseline][prompt]:
                if ours and theirs and ours.tokens != theirs.tokens:
                    position = parting(ours.tokens, theirs.tokens)
                    return baseline, position, tuple(ours.tokens[:position])
    return "", 0, ()


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Position of the first token that differs; where one ends first, its length."""
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


class LogitGaps:
    """Top-2 gaps of the target's processed logits; arms often part at the same place."""

    def __init__(self, sampling: SamplingConfig, target: HFTarget) -> None:
        self._target, self._sampling = target, sampling
        self._known: dict[tuple[int, ...], float | None] = {}

    def at(self, prompt: tuple[int, ...], prefix: tuple[int, ...]) -> float | None:
        """The gap after a prompt and the output so far; None where one token alone is allowed."""
        context = prompt + prefix
        if context not in self._known:
            self._known[context] = self._measure(prompt, prefix)
        return self._known[context]

    def _measure(self, prompt: tuple[int, ...], prefix: tuple[int, ...]) -> float | None:
        target = self._target
        sampler = Sampler(
            [self._sampling], target.vocab_size, target.device, [prompt], target.eos_token_ids
        )
        with claimed(target):
            logits = target.prefill([prompt + prefix]).logits
        if prefix:
            sampler.observe(logits.new_tensor([prefix]).long())
        best = sampler.scores(logits)[0, 0].float().topk(2).values
        gap = float(best[0] - best[1])
        return gap if math.isfinite(gap) else None


Item = TypeVar("Item")
Values = list[float | None]  # one a prompt; None where it failed or has no value

# Fewer prompts than this all lie on one side of the truth by chance in more than 5 % of runs.
MIN_PROMPTS = 5
# Share of a speedup that is put down to the machine.
NOISE = 0.1


class Work(NamedTuple):
    """Tokens of a prompt and the seconds that they took."""

    tokens: float
    seconds: float


Works = Sequence[Work | None]  # one a prompt; None where it failed or emitted nothing that counts


def decode_tokens(run: Run) -> int:
    """Tokens after the first chunk, which is prefill's."""
    return len(run.tokens) - run.num_first


def decode_speed(run: Run) -> float:
    """Tokens/s after the first chunk; nan without a later token."""
    later = decode_tokens(run)
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def seconds_per_token(run: Run) -> float:
    """Mean time between tokens after the first chunk; nan without a later token."""
    return 1 / decode_speed(run)


def end_to_end_speed(run: Run) -> float:
    """Tokens/s, prefill included."""
    return len(run.tokens) / (run.ttft_s + run.decode_s)


def decode_work(table: Table) -> list[Work | None]:
    """Tokens after the first chunk of each prompt, and their seconds."""
    return _work(table, decode_tokens, decode_speed)


def end_to_end_work(table: Table) -> list[Work | None]:
    """All tokens of each prompt, and their seconds with prefill."""
    return _work(table, lambda run: len(run.tokens), end_to_end_speed)


def _work(table: Table, tokens: Callable[[Run], int], of: Callable[[Run], float]) -> list:
    """A prompt's mean tokens at its median speed: one slow repeat moves nothing."""
    found: list[Work | None] = []
    for row, speed in zip(table, medians(table, of), strict=True):
        counts = [tokens(run) for run in row if run is not None]
        mean = sum(counts) / len(counts) if counts else 0
        found.append(Work(mean, mean / speed) if speed else None)
    return found


def total_speed(key: str, over: Sequence[Works], under: Sequence[Works] = ()) -> dict[str, Any]:
    """Total tokens over total seconds of each arm; those of `over` multiplied, of `under` divided.

    Args:
        key: name of the figure; its interval is `KEY_ci`.
        over: arms, each with one entry a prompt.
        under: likewise.

    Returns:
        The figure over the prompts that all arms have, and its interval by bootstrap over them, the
        arms drawn together.
    """
    both = [row for row in zip(*over, *under, strict=True) if None not in row]
    if not both:
        return {key: None, f"{key}_ci": None}

    def speed(*parts: np.ndarray, axis: int) -> Any:
        sums = [part.sum(axis=axis) for part in parts]
        speeds = [tokens / seconds for tokens, seconds in zip(sums[::2], sums[1::2], strict=True)]
        return np.prod(speeds[: len(over)], axis=0) / np.prod(speeds[len(over) :], axis=0)

    parts = tuple(np.array(both).reshape(len(both), -1).T)
    return {key: float(speed(*parts, axis=0)), f"{key}_ci": bootstrap_interval(parts, speed)}


def paired_ratios(table: Table, baseline: Table, of: Callable[[Run], float]) -> Values:
    """Each prompt's median of the ratios of speeds, paired within each repeat."""
    return [
        _median(
            of(a) / of(b)
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        )
        for ours, theirs in zip(table, baseline, strict=True)
    ]


def mean_ratio(table: Table, plain: Table) -> float | None:
    """Mean over prompts of the ratios of decode speeds: short, easy answers dominate it."""
    known = present(paired_ratios(table, plain, decode_speed))
    return float(np.mean(known)) if known else None


def medians(table: Sequence[Sequence[Item | None]], of: Callable[[Item], float]) -> Values:
    """Each prompt's median over its repeats; failed ones and those without a value are left out."""
    return [_median(of(run) for run in row if run is not None) for row in table]


def faster_than_tau(results: Mapping[str, Any]) -> list[str]:
    """Complaints about arms that were faster than their tau, which no drafter can be.

    A step costs at least what a step of plain decoding costs, so the speedup of rows that are
    decoded one at a time is at most tau. (In a batch rows that end early leave the others a
    cheaper one.) Intervals over prompts and a tenth of the speedup are put down to noise.

    Args:
        results: of a bench or a suite.
    """
    config = (results.get("provenance") or {}).get("config") or {}
    if results.get("suite") == "concurrent" or config.get("batch_size", 1) > 1:
        return []
    return [
        f"the arm {arm['name']!r}{part.get('name', '') and ' in ' + part['name']} is "
        f"{arm['speedup_vs_plain']:.2f} times as fast as plain decoding (at least {low:.2f}) but "
        f"accepts only {arm['tau']:.2f} tokens a step (at most {arm['tau_ci'][1]:.2f}), which no "
        "speed can pass: the machine was busy while plain decoding ran; measure again in a new "
        "folder with nothing else running"
        for part in results.get("groups", [results])
        for arm in part["arms"]
        if arm["tau_ci"]
        and arm["speedup_vs_plain_ci"]
        and arm.get("prompts", arm.get("requests")) >= MIN_PROMPTS
        and (low := arm["speedup_vs_plain_ci"][0]) > (1 + NOISE) * arm["tau_ci"][1]
    ]


def present(values: Values) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return median(finite) if finite else None


_PARTS = ("draft", "target", "verify", "commit")


def time_s(records: Sequence[StepRecord]) -> dict[str, float]:
    """Seconds by part of the step, "other" for the rest, and "wall" for all."""
    times = {part: _total(records, part) for part in _PARTS}
    wall = _total(records, "wall")
    return {**times, "other": wall - sum(times.values()), "wall": wall}


def loop_efficiency(records: Sequence[StepRecord]) -> float | None:
    """Share of the wall time in model forwards; None without a step."""
    times = time_s(records)
    return (times["draft"] + times["target"]) / times["wall"] if times["wall"] else None


def other_ms_per_step(records: Sequence[StepRecord]) -> float | None:
    """Median time in neither model per target step, ms."""
    gaps = [r.wall_s - r.draft_s - r.target_s for r in records]
    return 1000 * median(gaps) if gaps else None


def _total(records: Sequence[StepRecord], part: str) -> float:
    """A batch's time counts once, not once a row."""
    return sum(getattr(record, f"{part}_s") / record.batch_size for record in records)


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
