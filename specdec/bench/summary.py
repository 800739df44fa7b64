"""From finished calls to results: arms of benches and of suites."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any, Literal

from specdec.bench.config import ArmConfig, BenchConfig, RunConfig, SuiteConfig
from specdec.bench.differences import Difference, find_differences
from specdec.bench.figures import (
    Calls,
    Table,
    arm_figures,
    calls_of,
    decode_work,
    headline,
    largest_memory,
    over_requests,
    paired_ratios,
    records_of,
    step_times,
    table_of,
)
from specdec.bench.load import load_figures
from specdec.bench.results import (
    BenchArm,
    BenchProvenance,
    BenchResults,
    DomainFigures,
    Finish,
    GroupResults,
    Power,
    PromptDifference,
    PromptFailure,
    PromptFigures,
    PromptInfo,
    RequestDifference,
    RequestFailure,
    RequestInfo,
    SuiteArm,
    SuiteProvenance,
    SuiteResults,
)
from specdec.bench.store import Call, Key, Run
from specdec.bench.workloads import Group, Request, numbered
from specdec.checkpoints.identity import identify_target
from specdec.common.stats import percentiles, total_speed
from specdec.engine.metrics import AcceptanceStats
from specdec.targets.hf import HFTarget

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
        differences: differences by arm, from `find_differences`.
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
    records = records_of(chain(*table))
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
        **arm_figures(
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
    records = records_of(runs)
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
            prompts=len(rows), **headline(ours, theirs), **_speed_vs_hf(ours, hfs)
        )
    return found


def _per_prompt(
    table: Table, plain: Table, eos_token_ids: Sequence[int]
) -> list[PromptFigures | None]:
    """Figures of each prompt, sums over its repeats; None for one that always failed."""
    found: list[PromptFigures | None] = []
    for row, work, ratio in zip(
        table, decode_work(table), paired_ratios(table, plain), strict=True
    ):
        runs = [run for run in row if run is not None]
        if not runs:
            found.append(None)
            continue
        stats = AcceptanceStats.from_records(records_of(runs))
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
        **arm_figures(
            table,
            table_of(plain),
            waited=lambda run: run.waited_s,
            ttft=lambda run: run.queue_s + run.ttft_s,
            wanted=wanted,
        ),
        queue_s=over_requests(table, lambda run: run.queue_s, wanted),
        latency_s=over_requests(table, lambda run: run.waited_s, wanted),
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
