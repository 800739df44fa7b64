"""From finished calls to results: arms of benches and of suites."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain, count, islice, pairwise, product
from statistics import median, mode
from typing import Any, Literal

from specdec.bench import results as models
from specdec.bench.config import BenchConfig, ConcurrentConfig, RunConfig, SamplingOptions
from specdec.bench.figures import (
    Table,
    acceptance,
    arm_figures,
    decode_work,
    largest_memory,
    load_figures,
    over_requests,
    paired_ratios,
    records_of,
    runs_of,
    speeds,
    step_times,
)
from specdec.bench.measure import Call, Run
from specdec.bench.workloads import Group, Request
from specdec.checkpoints.identity import identify_target
from specdec.common.stats import Work, percentiles
from specdec.engine.interfaces import claimed
from specdec.sampling.sampler import Sampler
from specdec.targets.hf import HFTarget

Calls = Mapping[str, Sequence[Sequence[Call]]]  # arm -> [call][repeat]
Differences = Mapping[str, Sequence[models.PromptDifference]]  # by arm


def summarize(
    config: RunConfig,
    target: HFTarget,
    groups: Sequence[Group],
    done: Mapping[tuple[int, int, str], Call],
    provenance: dict[str, Any],
) -> models.BenchResults | models.SuiteResults:
    """Make the results of a run whose calls are all done."""
    memory, numbers, found = largest_memory(done.values()), count(), []
    for group in groups:
        own = list(islice(numbers, len(group.calls)))
        calls = {
            name: [[done[r, number, name] for r in range(config.repeats)] for number in own]
            for name in config.arm_names
        }
        tables = {name: table_of(each) for name, each in calls.items()}
        differences = find_differences(group.requests, tables, config, target)
        if isinstance(config, BenchConfig):
            return models.BenchResults(
                provenance=models.BenchProvenance(**provenance),
                target=identify_target(target),
                prompts=[models.PromptInfo.model_validate(each) for each in group.requests],
                memory=memory,
                arms=bench_arms(config, group, calls, differences, target.eos_token_ids),
            )
        found.append(suite_group(config, group, calls, differences))
    where = models.SuiteProvenance(**provenance)
    suite = where.config.suite
    return models.SuiteResults(suite=suite, provenance=where, memory=memory, groups=found)


def table_of(calls: Sequence[Sequence[Call]]) -> Table:
    by_call = (zip(*(call.rows for call in repeats), strict=True) for repeats in calls)
    return [list(row) for row in chain(*by_call)]


def find_differences(
    requests: Sequence[Request],
    tables: Mapping[str, Table],
    config: RunConfig,
    target: HFTarget | None,
    baselines: Sequence[str] = (),
) -> dict[str, list[models.PromptDifference]]:
    """Find, by arm, the requests whose greedy tokens differ from a baseline's; none when sampling.

    Half precision rounds differently in batches of other shapes, so that near ties may fall the
    other way: the gap between the two best logits at the first difference says whether it was one.
    Where our cache is quantized, transformers' arms are compared with each other alone.
    """
    is_apart = config.target.cache != "none"
    apart = {arm.name for arm in config.all_arms if is_apart and arm.type.startswith("hf_")}
    found: dict[str, list[models.PromptDifference]] = {name: [] for name in tables}
    gap = cache(partial(_top2_gap, target, config.sampling))  # arms often differ at one place
    for name, place in product(tables, range(len(requests))):
        pairs = (
            (against, ours.tokens, theirs.tokens)
            for against in baselines or config.baselines
            if (name in apart) == (against in apart)
            for ours in runs_of(tables[name][place])
            for theirs in runs_of(tables[against][place])
            if ours.tokens != theirs.tokens and not config.sampling.temperature
        )
        for against, ours, theirs in islice(pairs, 1):
            equal = [a == b for a, b in zip(ours, theirs, strict=False)]
            position = [*equal, False].index(False)
            top2_gap = gap(tuple(requests[place].prompt), tuple(ours[:position]))
            found[name].append(
                models.PromptDifference(
                    prompt=place, against=against, position=position, top2_gap=top2_gap
                )
            )
    return found


def _top2_gap(
    target: Any, sampling: SamplingOptions, prompt: Sequence[int], output: Sequence[int]
) -> float | None:
    """Gap between the two best processed logits; None where one token alone is allowed."""
    if target is None:  # it is elsewhere
        return None
    eos, configs = target.eos_token_ids, [sampling.with_seed(0)]
    sampler = Sampler(configs, target.vocab_size, target.device, [prompt], eos)
    with claimed(target):
        logits = target.prefill([[*prompt, *output]]).logits
    if output:
        sampler.observe(logits.new_tensor([output]).long())
    best = sampler.scores(logits)[0, 0].float().topk(2).values
    gap = float(best[0] - best[1])
    return gap if math.isfinite(gap) else None


def _failures(table: Table) -> list[models.PromptFailure]:
    return [
        models.PromptFailure(prompt=place, repeat=repeat, reason=row)
        for repeat, rows in enumerate(zip(*table, strict=True))
        for place, row in enumerate(rows)
        if isinstance(row, str)
    ]


# --- Benches ---


def bench_arms(
    config: BenchConfig,
    group: Group,
    calls: Calls,
    differences: Differences,
    eos_token_ids: Sequence[int],
) -> list[models.BenchArm]:
    """Figures of every arm; an answer that ends with no end-of-sequence id was cut."""
    tables = {name: table_of(each) for name, each in calls.items()}
    baselines = {"plain": tables["plain"], "hf": tables["hf_generate"]}
    domains: dict[str, list[int]] = {}
    for place, request in enumerate(group.requests):
        domains.setdefault(request.domain, []).append(place)

    def finish(run: Run) -> Literal["eos", "length"]:
        return "eos" if run.tokens[-1] in eos_token_ids else "length"

    def domain_figures(table: Table, places: Sequence[int]) -> models.DomainFigures:
        ours, *theirs = ([each[i] for i in places] for each in (table, *baselines.values()))
        figures = speeds(ours, dict(zip(baselines, theirs, strict=True)))
        return models.DomainFigures(prompts=len(places), **figures)

    arms = []
    for arm in config.all_arms:
        table, own = tables[arm.name], list(chain(*calls[arm.name]))
        gaps_s = [one.wall_s - one.draft_s - one.target_s for one in records_of(chain(*table))]
        ends = [finish(run) for run in runs_of(row[0] for row in table)]
        works, ratios = decode_work(table), paired_ratios(table, baselines["plain"])
        per_prompt = [
            _prompt_figures(row, work, ratio, finish)
            for row, work, ratio in zip(table, works, ratios, strict=True)
        ]
        found = models.BenchArm(
            **arm.model_dump(mode="json"),
            **arm_figures(table, baselines, (50, 90, 99), has_queue=False),
            **_throughput(own, config.batch_size),
            compile_mode=mode(call.compile_mode for call in own),
            other_ms_per_step=1000 * median(gaps_s) if gaps_s else None,
            **largest_memory(own).model_dump(),
            power=_power(own),
            domains={name: domain_figures(table, places) for name, places in domains.items()},
            per_prompt=per_prompt,
            finish=models.Finish(eos=ends.count("eos"), length=ends.count("length")),
            mismatches=None if config.sampling.temperature > 0 else len(differences[arm.name]),
            differences=list(differences[arm.name]),
            failures=_failures(table),
            prompts=len(table),
        )
        arms.append(found)
    return arms


def _prompt_figures(
    row: Sequence[Run | str], work: Work | None, ratio: float | None, finish: Callable[[Run], Any]
) -> models.PromptFigures | None:
    """Figures of a prompt, sums over its repeats; None for one that always failed."""
    runs, stats = runs_of(row), acceptance(row)
    return (runs or None) and models.PromptFigures(
        steps=stats.num_steps,
        drafted=stats.num_drafted,
        accepted=stats.num_accepted,
        tokens=sum(len(run.tokens) for run in runs),
        tau=stats.accepted_length if stats.num_steps else None,
        decode_tokens=work and work.tokens,
        decode_s=work and work.seconds,
        decode_tokens_per_s=work and work.tokens / work.seconds,
        speedup_vs_plain=ratio,
        finish=finish(runs[0]),
    )


def _throughput(calls: Iterable[Call], batch_size: int) -> dict[str, Any]:
    """Tokens of all rows a second: over whole calls, prefills included, and while decoding.

    Calls with a failed prompt are left out.
    """
    whole = [call for call in calls if call.wall_s]
    runs = [run for call in whole for run in call.runs]
    records, wall_s = records_of(runs), sum(call.wall_s or 0.0 for call in whole)
    # Without records, of transformers: from first to last chunks of its batches.
    waits = (
        max(run.decode_s for run in call.runs[first : first + batch_size])
        for call in whole
        for first in range(0, len(call.runs), batch_size)
    )
    decode_s = step_times(records).wall if records else sum(waits)
    later = sum(len(run.tokens) - run.num_first for run in runs)
    return {
        "batch_tokens_per_s": sum(len(run.tokens) for run in runs) / wall_s if wall_s else None,
        "batch_decode_tokens_per_s": later / decode_s if decode_s else None,
    }


# --- Suites ---


def suite_group(
    config: RunConfig, group: Group, calls: Calls, differences: Differences, plain: str = "plain"
) -> models.GroupResults:
    ids = [request.id for request in group.requests]
    baselines, wanted = {"plain": table_of(calls[plain])}, (50, 95, 99)
    is_load = isinstance(config, ConcurrentConfig)
    arms = []
    for name, each in calls.items():
        table, own = table_of(each), list(chain(*each))
        chunks = (pairwise(run.chunk_s) for run in runs_of(chain(*table)))
        arm = models.SuiteArm(
            name=name,
            **arm_figures(table, baselines, wanted, has_queue=True),
            queue_s=over_requests(table, lambda run: run.queue_s, wanted),
            latency_s=over_requests(table, lambda run: run.waited_s, wanted),
            chunk_gap_s=percentiles([b - a for a, b in chain(*chunks)], wanted),
            requests=len(table),
            mismatches=None if config.sampling.temperature > 0 else len(differences[name]),
            differences=[
                models.RequestDifference(
                    request=ids[one.prompt], position=one.position, top2_gap=one.top2_gap
                )
                for one in differences[name]
            ],
            failures=[
                models.RequestFailure(request=ids[one.prompt], **one.model_dump(exclude={"prompt"}))
                for one in _failures(table)
            ],
            memory=largest_memory(own),
            power=_power(own),
            load=load_figures(group.requests, each[0], calls[plain][0]) if is_load else None,
        )
        arms.append(arm)
    requests = [models.RequestInfo.model_validate(each) for each in group.requests]
    return models.GroupResults(name=group.name, value=group.value, requests=requests, arms=arms)


def _power(calls: Sequence[Call]) -> models.Power:
    """Energy and use of whole calls that were measured, over their seconds and tokens."""

    whole = [call for call in calls if call.wall_s]

    def per_s(kind: str) -> float | None:
        known = [call for call in whole if getattr(call, kind) is not None]
        total = sum(getattr(call, kind) for call in known)
        return total / sum(call.wall_s or 0.0 for call in known) if known else None

    measured = [call for call in whole if call.energy_j is not None]
    energy_j = sum(call.energy_j or 0.0 for call in measured)
    tokens = sum(len(run.tokens) for call in measured for run in call.runs)
    used = [call.gpu_memory_bytes or 0.0 for call in whole]
    return models.Power(
        energy_j=energy_j if measured else None,
        power_w=per_s("energy_j"),
        energy_j_per_token=energy_j / tokens if tokens else None,
        tokens_per_j=tokens / energy_j if energy_j else None,
        gpu_utilization=per_s("gpu_busy_s"),
        gpu_memory_bytes=max(used, default=0.0) or None,
        cpu_cores=per_s("cpu_s"),
    )


# --- What cannot be ---


def places(results: models.BenchResults | models.SuiteResults) -> list[tuple[str, Sequence[Any]]]:
    """Arms that were measured on the same requests, with their place in words."""
    if isinstance(results, models.SuiteResults):
        return [(f" in {group.name}", group.arms) for group in results.groups]
    return [("", results.arms)]


def faster_than_tau(results: models.BenchResults | models.SuiteResults) -> list[str]:
    """Complaints about arms that were faster than their tau, which no drafter can be.

    A step costs at least what a step of plain decoding costs, so the speedup of rows that are
    decoded one at a time is at most tau. (In a batch rows that end early leave the others a
    cheaper one.) Intervals over prompts and a tenth of the speedup are put down to noise; fewer
    than five prompts lie on one side of the truth by chance in more than 5 % of runs.
    """
    return [
        f"the arm {arm.name!r}{place} is {arm.speedup_vs_plain:.2f} times as fast as plain "
        f"decoding (at least {low:.2f}) but accepts only {arm.tau:.2f} tokens a step (at most "
        f"{arm.tau_ci[1]:.2f}), which no speed can pass: the machine was busy while plain decoding "
        "ran; measure again in a new folder with nothing else running"
        for place, arms in places(results)
        for arm in arms
        if results.provenance.config.rows == 1
        and arm.tau_ci
        and arm.speedup_vs_plain_ci
        and getattr(arm, f"{results.NOUN}s") >= 5
        and (low := arm.speedup_vs_plain_ci[0]) > 1.1 * arm.tau_ci[1]
    ]
