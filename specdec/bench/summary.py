"""From finished calls to the figures of results; definitions stand in `specdec.engine.metrics`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from statistics import median
from typing import Any, Literal

import numpy as np

from specdec.bench.config import ArmConfig, BenchConfig, RunConfig, SuiteConfig
from specdec.bench.differences import Difference, find_differences
from specdec.bench.load import load_figures
from specdec.bench.results import (
    BenchArm,
    BenchProvenance,
    BenchResults,
    DomainFigures,
    Finish,
    GroupResults,
    Memory,
    Power,
    PromptDifference,
    PromptFailure,
    PromptFigures,
    PromptInfo,
    RequestDifference,
    RequestFailure,
    RequestInfo,
    StepTimes,
    SuiteArm,
    SuiteProvenance,
    SuiteResults,
)
from specdec.bench.store import Call, Key, Peaks, Run
from specdec.bench.workloads import Group, Request, numbered
from specdec.checkpoints.identity import identify_target
from specdec.common.stats import Work, percentiles, tau_interval, total_speed
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.targets.hf import HFTarget

Table = list[list[Run | None]]  # [request][repeat]; None where it failed
Calls = list[list[Call]]  # [call][repeat]
Values = list[float | None]  # one a request; None where it failed or has no value
Measure = Callable[[Run], float]

# Fewer prompts than this all lie on one side of the truth by chance in more than 5 % of runs.
MIN_PROMPTS = 5
# Share of a speedup that is put down to the machine.
NOISE = 0.1


def summarize(
    config: RunConfig,
    target: HFTarget,
    groups: Sequence[Group],
    done: Mapping[Key, Call],
    provenance: dict[str, Any],
) -> BenchResults | SuiteResults:
    """Make the results of a run whose calls are all done."""
    memory = largest_memory(done.values())
    found = []
    for first, group in numbered(groups):
        calls = {
            name: calls_of(group, first, name, done, config.repeats) for name in config.arm_names
        }
        tables = {name: table_of(each) for name, each in calls.items()}
        differences = find_differences(
            group.requests, tables, config.baselines, config.sampling, target
        )
        if isinstance(config, BenchConfig):
            return BenchResults(
                provenance=BenchProvenance(**provenance),
                target=identify_target(target),
                prompts=[PromptInfo(**_prompt_info(request)) for request in group.requests],
                memory=memory,
                arms=bench_arms(config, group, calls, differences, target.eos_token_ids),
            )
        found.append(suite_group(config, group, calls, differences))
    assert isinstance(config, SuiteConfig)
    where = SuiteProvenance(**provenance)
    return SuiteResults(suite=config.suite, provenance=where, memory=memory, groups=found)


def calls_of(group: Group, first: int, arm: str, done: Mapping[Key, Call], repeats: int) -> Calls:
    """The calls of one arm in a group whose first call has this number."""
    numbers = range(first, first + len(group.calls))
    return [[done[repeat, number, arm] for repeat in range(repeats)] for number in numbers]


def table_of(calls: Calls) -> Table:
    """What each request of a group gave in each repeat."""
    return [
        [None if isinstance(row, str) else row for row in rows]
        for repeats in calls
        for rows in zip(*(call.rows for call in repeats), strict=True)
    ]


# --- Figures of any table ---


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


def _records(runs: Iterable[Run | None]) -> list[StepRecord]:
    return [record for run in runs if run is not None for record in run.records]


def step_times(records: Sequence[StepRecord]) -> StepTimes:
    """Seconds by part of the step; a batch's time counts once, not once a row."""
    parts = {
        part: sum(getattr(record, f"{part}_s") / record.batch_size for record in records)
        for part in ("draft", "target", "verify", "commit", "wall")
    }
    other = 2 * parts["wall"] - sum(parts.values())
    return StepTimes(**parts, other=other)


def _headline(table: Table, plain: Table) -> dict[str, Any]:
    """Tau and speeds with their intervals."""
    records, work = _records(chain(*table)), decode_work(table)
    by_request = [AcceptanceStats.from_records(_records(row)) for row in table]
    return {
        "tau": AcceptanceStats.from_records(records).accepted_length if records else None,
        "tau_ci": tau_interval(by_request) if records else None,
        **total_speed("decode_tokens_per_s", [work]),
        **total_speed("speedup_vs_plain", [work], [decode_work(plain)]),
    }


def _arm_figures(
    table: Table, plain: Table, waited: Measure, ttft: Measure, wanted: Sequence[int]
) -> dict[str, Any]:
    """What every arm has; `waited` and `ttft` are seconds of a run, with or without a queue."""
    records = _records(chain(*table))
    stats, times = AcceptanceStats.from_records(records), step_times(records)
    assert abs(1 + sum(stats.acceptance_at_depth) - stats.accepted_length) < 1e-9
    ratios = _present(paired_ratios(table, plain))
    whole, whole_plain = (_whole_work(each, waited) for each in (table, plain))
    by_request = {"ttft_s": ttft, "itl_s": lambda run: 1 / decode_speed(run)}
    return {
        **_headline(table, plain),
        "mean_speedup_vs_plain": float(np.mean(ratios)) if ratios else None,
        **total_speed("end_to_end_speedup_vs_plain", [whole], [whole_plain]),
        "acceptance_rate": stats.acceptance_rate if records else None,
        "per_depth": list(stats.acceptance_at_depth),
        "per_depth_conditional": list(stats.conditional_acceptance_at_depth),
        "loop_efficiency": (times.draft + times.target) / times.wall if times.wall else None,
        "time_s": times,
        **{key: _over_requests(table, each, wanted) for key, each in by_request.items()},
        "tokens": sum(len(row[0].tokens) for row in table if row[0] is not None),
        "failed": sum(any(run is None for run in row) for row in table),
    }


def _over_requests(table: Table, measure: Measure, wanted: Sequence[int]) -> dict[str, float]:
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


# --- Benches ---


def bench_arms(
    config: BenchConfig,
    group: Group,
    calls: Mapping[str, Calls],
    differences: Mapping[str, Sequence[Difference]],
    eos_token_ids: Sequence[int],
) -> list[BenchArm]:
    """Figures of every arm of a bench.

    Args:
        config: the bench.
        group: its prompts.
        calls: calls by arm.
        differences: see `find_differences`.
        eos_token_ids: an answer that ends with none of them was cut at its length.
    """
    tables = {name: table_of(each) for name, each in calls.items()}
    baselines = [ArmConfig(type=name) for name in config.baselines]
    return [
        _bench_arm(
            config, arm, group, calls[arm.name], tables, differences[arm.name], eos_token_ids
        )
        for arm in (*baselines, *config.arms)
    ]


def _bench_arm(
    config: BenchConfig,
    arm: ArmConfig,
    group: Group,
    calls: Calls,
    tables: Mapping[str, Table],
    differences: Sequence[Difference],
    eos_token_ids: Sequence[int],
) -> BenchArm:
    table, plain = tables[arm.name], tables["plain"]
    flat = [call for repeats in calls for call in repeats]
    records = _records(chain(*table))
    gaps_s = [record.wall_s - record.draft_s - record.target_s for record in records]
    memory = largest_memory(flat)
    lengths = arm.draft_length
    firsts = [row[0] for row in table if row[0] is not None]
    ends = Counter(_finish(run, eos_token_ids) for run in firsts)
    return BenchArm(
        name=arm.name,
        type=arm.type,
        options=arm.options,
        draft_length=None if lengths is None else {str(key): v for key, v in lengths.items()},
        **_arm_figures(
            table,
            plain,
            waited=lambda run: run.ttft_s + run.decode_s,
            ttft=lambda run: run.ttft_s,
            wanted=(50, 90, 99),
        ),
        **_speed_vs_hf(table, tables["hf_generate"]),
        **_throughput(flat, config.batch_size),
        other_ms_per_step=1000 * median(gaps_s) if gaps_s else None,
        peak_device_bytes=memory.peak_device_bytes,
        cache_bytes=memory.cache_bytes,
        domains=_domains(table, plain, tables["hf_generate"], group.requests),
        per_prompt=_per_prompt(table, plain, eos_token_ids),
        finish=Finish(eos=ends["eos"], length=ends["length"]),
        mismatches=None if config.sampling.temperature > 0 else len(differences),
        differences=[
            PromptDifference(prompt=place, against=against, position=position, top2_gap=gap)
            for place, against, position, gap in differences
        ],
        failures=[
            PromptFailure(prompt=place, repeat=repeat, reason=reason)
            for repeat, place, reason in sorted(_failures(calls))
        ],
        prompts=len(table),
    )


def _speed_vs_hf(table: Table, hf: Table) -> dict[str, Any]:
    return total_speed("speedup_vs_hf", [decode_work(table)], [decode_work(hf)])


def _prompt_info(request: Request) -> dict[str, Any]:
    return {
        "id": request.id,
        "domain": request.domain,
        "num_tokens": len(request.prompt),
        "fingerprint": request.fingerprint,
    }


def _failures(calls: Calls) -> list[tuple[int, int, str]]:
    """Repeat, place of the request, and reason of every failure."""
    found, place = [], 0
    for repeats in calls:
        for repeat, call in enumerate(repeats):
            found += [
                (repeat, place + i, row) for i, row in enumerate(call.rows) if isinstance(row, str)
            ]
        place += len(repeats[0].rows)
    return found


def _throughput(calls: Sequence[Call], batch_size: int) -> dict[str, Any]:
    """Tokens of all rows a second: over whole calls, prefills included, and while decoding.

    Calls with a failed prompt are left out.
    """
    timed = [(call.runs, call.wall_s) for call in calls if call.wall_s]
    tokens = sum(len(run.tokens) for runs, _ in timed for run in runs)
    later = sum(len(run.tokens) - run.num_first for runs, _ in timed for run in runs)
    decoding = sum(_decoding_s(runs, batch_size) for runs, _ in timed)
    return {
        "batch_tokens_per_s": tokens / sum(wall_s for _, wall_s in timed) if timed else None,
        "batch_decode_tokens_per_s": later / decoding if decoding else None,
    }


def _decoding_s(runs: list[Run], batch_size: int) -> float:
    """Seconds of a call's decode steps; without records, of its batches' first to last chunks."""
    records = _records(runs)
    if records:
        return step_times(records).wall
    batches = [runs[first : first + batch_size] for first in range(0, len(runs), batch_size)]
    return sum(max(run.decode_s for run in batch) for batch in batches)


def _domains(
    table: Table, plain: Table, hf: Table, requests: Sequence[Request]
) -> dict[str, DomainFigures]:
    """The headline of every domain, in the order in which they first appear."""
    found = {}
    for domain in dict.fromkeys(request.domain for request in requests):
        rows = [place for place, request in enumerate(requests) if request.domain == domain]
        ours, theirs, hfs = ([each[row] for row in rows] for each in (table, plain, hf))
        found[domain] = DomainFigures(
            prompts=len(rows), **_headline(ours, theirs), **_speed_vs_hf(ours, hfs)
        )
    return found


def _per_prompt(
    table: Table, plain: Table, eos_token_ids: Sequence[int]
) -> list[PromptFigures | None]:
    """What each prompt gave, sums over its repeats; None for one that always failed."""
    found: list[PromptFigures | None] = []
    for row, work, ratio in zip(
        table, decode_work(table), paired_ratios(table, plain), strict=True
    ):
        runs = [run for run in row if run is not None]
        if not runs:
            found.append(None)
            continue
        stats = AcceptanceStats.from_records(_records(runs))
        found.append(
            PromptFigures(
                steps=stats.num_steps,
                drafted=stats.num_drafted,
                accepted=stats.num_accepted,
                tokens=sum(len(run.tokens) for run in runs),
                tau=stats.accepted_length if stats.num_steps else None,
                decode_tokens=work and work.tokens,
                decode_s=work and work.seconds,
                decode_tokens_per_s=work and work.tokens / work.seconds,
                speedup_vs_plain=ratio,
                finish=_finish(runs[0], eos_token_ids),
            )
        )
    return found


def _finish(run: Run, eos_token_ids: Sequence[int]) -> Literal["eos", "length"]:
    return "eos" if run.tokens[-1] in eos_token_ids else "length"


# --- Suites ---


def suite_group(
    config: RunConfig,
    group: Group,
    calls: Mapping[str, Calls],
    differences: Mapping[str, Sequence[Difference]],
) -> GroupResults:
    """The requests of a group, and the figures of every arm."""
    requests = [
        RequestInfo(
            **_prompt_info(request),
            user=request.user,
            max_new_tokens=request.max_new_tokens,
            arrival_s=request.arrival_s,
        )
        for request in group.requests
    ]
    arms = [
        _suite_arm(config, name, group, each, calls["plain"], differences[name])
        for name, each in calls.items()
    ]
    return GroupResults(name=group.name, value=group.value, requests=requests, arms=arms)


def _suite_arm(
    config: RunConfig,
    name: str,
    group: Group,
    calls: Calls,
    plain: Calls,
    differences: Sequence[Difference],
) -> SuiteArm:
    table, wanted = table_of(calls), (50, 95, 99)
    runs = [run for row in table for run in row if run is not None]
    flat = [call for repeats in calls for call in repeats]
    ids = [request.id for request in group.requests]
    has_users = isinstance(config, SuiteConfig) and config.suite == "concurrent"
    return SuiteArm(
        name=name,
        **_arm_figures(
            table,
            table_of(plain),
            waited=lambda run: run.waited_s,
            ttft=lambda run: run.queue_s + run.ttft_s,
            wanted=wanted,
        ),
        queue_s=_over_requests(table, lambda run: run.queue_s, wanted),
        latency_s=_over_requests(table, lambda run: run.waited_s, wanted),
        chunk_gap_s=percentiles([gap for run in runs for gap in run.gaps_s], wanted),
        requests=len(table),
        mismatches=None if config.sampling.temperature > 0 else len(differences),
        differences=[
            RequestDifference(request=ids[place], position=position, top2_gap=gap)
            for place, _, position, gap in differences
        ],
        failures=[
            RequestFailure(request=ids[place], repeat=repeat, reason=reason)
            for repeat, place, reason in _failures(calls)
        ],
        memory=largest_memory(flat),
        power=_power(flat),
        load=load_figures(group.requests, calls[0], plain[0]) if has_users else None,
    )


def _power(calls: Iterable[Call]) -> Power:
    """Energy of the calls that were measured, over their seconds and over their tokens."""
    measured = [call for call in calls if call.energy_j is not None and call.wall_s]
    energy_j = sum(call.energy_j or 0.0 for call in measured)
    seconds = sum(call.wall_s or 0.0 for call in measured)
    tokens = sum(len(run.tokens) for call in measured for run in call.runs)
    return Power(
        energy_j=energy_j if measured else None,
        power_w=energy_j / seconds if measured else None,
        energy_j_per_token=energy_j / tokens if tokens else None,
    )


# --- What cannot be ---


def faster_than_tau(results: BenchResults | SuiteResults) -> list[str]:
    """Complaints about arms that were faster than their tau, which no drafter can be.

    A step costs at least what a step of plain decoding costs, so the speedup of rows that are
    decoded one at a time is at most tau. (In a batch rows that end early leave the others a
    cheaper one.) Intervals over prompts and a tenth of the speedup are put down to noise.
    """
    if results.provenance.config.rows > 1:
        return []
    return [
        f"the arm {arm.name!r}{place} is {arm.speedup_vs_plain:.2f} times as fast as plain "
        f"decoding (at least {low:.2f}) but accepts only {arm.tau:.2f} tokens a step (at most "
        f"{arm.tau_ci[1]:.2f}), which no speed can pass: the machine was busy while plain decoding "
        "ran; measure again in a new folder with nothing else running"
        for place, arms in results.parts
        for arm in arms
        if arm.tau_ci
        and arm.speedup_vs_plain_ci
        and getattr(arm, f"{results.NOUN}s") >= MIN_PROMPTS
        and (low := arm.speedup_vs_plain_ci[0]) > (1 + NOISE) * arm.tau_ci[1]
    ]
