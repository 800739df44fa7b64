"""A bake-off: servers, and engines started one after the other, asked for the same answers.

An endpoint that is measured alone is a bake-off of one.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from specdec.bench import results as models
from specdec.bench.config import (
    ConcurrentConfig,
    SamplingOptions,
    build_config,
    read_config,
)
from specdec.bench.figures import decode_work, speeds
from specdec.bench.log import log_results
from specdec.bench.measure import PROMPT_ERRORS, Call
from specdec.bench.runner import Store, check_results, provenance_of, take_turns, warm_up
from specdec.bench.summary import find_differences, suite_group, table_of
from specdec.bench.workloads import Group, Progress, make_groups
from specdec.checkpoints.identity import TARGET, as_json
from specdec.common.config import read_model, validated
from specdec.common.files import read_json
from specdec.common.stats import total_speed
from specdec.engines.endpoints import EndpointArm, ServedTarget
from specdec.engines.results import (
    BakeOffArm,
    BakeOffConfig,
    BakeOffProvenance,
    BakeOffResults,
    EndpointConfig,
    LoadFigures,
)

_REPLACED = {"url", "api_key_variable", "timeout_s", "load"}  # freely, when a run goes on
_GROUPS = TypeAdapter(list[Group])
_NO_MEMORY = models.Memory(peak_rss_bytes=None, peak_device_bytes=None, cache_bytes=None)


def load_bake_off(
    path: str, overrides: Sequence[str] = (), endpoint: dict[str, Any] | None = None
) -> BakeOffConfig:
    """Read a bench or a suite with `endpoints`; or one whose arms give way to this endpoint."""
    given = read_config(path, overrides)
    given = dict(given) if isinstance(given, dict) else {}
    endpoints = given.pop("endpoints", None) if endpoint is None else [endpoint]
    run = build_config(given)
    if isinstance(run, ConcurrentConfig) or run.rows > 1:
        raise ValueError(
            f"config {path!r} is of requests at the same time, and an endpoint is asked one after "
            "the other; measure its load by GuideLLM, and give that report as load"
        )
    run = run.model_copy(update={"arms": []})
    return validated(BakeOffConfig, {"run": run, "endpoints": endpoints})


# --- The run ---


def run_bake_off(
    config: BakeOffConfig, out: Path, progress: Progress = lambda done, total, text: None
) -> BakeOffResults:
    """Measure what is not in the folder yet and write `bake-off.json` there.

    Servers that run take turns by call; an engine that is started has all its calls at once. One
    that fails is reported with its reason, and the others are measured.
    """
    endpoints, run = {each.name: each for each in config.endpoints}, config.run
    loads = [row for each in config.endpoints for row in read_loads(each)]
    target: Any = ServedTarget(run.target)
    provenance = provenance_of(config, "", target)
    identity = {key: provenance[key] for key in ("cpu", "cpu_count")}
    identity |= {"config": provenance["config"]["run"], TARGET: as_json(target.identity)}
    identity["endpoints"] = [each.model_dump(exclude=_REPLACED) for each in config.endpoints]
    failed: dict[str, str] = {}

    def open_arm(stack: ExitStack, each: EndpointConfig, sampling: SamplingOptions) -> EndpointArm:
        """Make an arm; an engine that is started runs as long as the stack."""
        url = each.url or stack.enter_context(_start(each, config, out))
        return EndpointArm(each, url, sampling, target)

    with Store(out, identity, provenance) as store:
        num_before = len(store.done)
        known = next((row["groups"] for row in store.rows() if "groups" in row), None)
        if known is None:
            with ExitStack() as stack:  # later turns follow the first one's greedy answers
                first = cache(lambda: open_arm(stack, config.endpoints[0], SamplingOptions()))
                target.answers = lambda prompts, limit: first().answers(prompts, limit)
                known = [asdict(group) for group in make_groups(run, target, progress)]
            store.append({"groups": known})
        groups = _GROUPS.validate_python(known)
        total = sum(len(group.calls) for group in groups) * run.repeats * len(endpoints)

        def show(text: str) -> None:
            progress(len(store.done), total, text)

        running = [name for name, each in endpoints.items() if each.url]
        started = [[name] for name in endpoints if name not in running]
        for names in filter(None, [running, *started]):
            arms: dict[str, EndpointArm] = {}
            with ExitStack() as stack:
                for key, group, requests in take_turns(groups, names, run.repeats):
                    if key in store.done or key.arm in failed:
                        continue
                    try:
                        if key.arm not in arms:
                            show(f"start of {key.arm}")
                            arms[key.arm] = open_arm(stack, endpoints[key.arm], run.sampling)
                            warm_up({key.arm: arms[key.arm]}, groups, [1], show)
                        show(f"{key.arm}, repeat {key.repeat + 1}, {group}, call {key.call + 1}")
                        rows = arms[key.arm](requests, lambda: None)
                    except (FileNotFoundError, ConnectionError, *PROMPT_ERRORS) as error:
                        failed[key.arm] = str(error)
                    else:
                        served = arms[key.arm].served
                        store.add(key, Call(rows, None, _NO_MEMORY, served=served))
        show("done")
    found = _summarize(config, target, groups, store.done, failed)
    where = BakeOffProvenance(**store.provenance)
    results = BakeOffResults(provenance=where, target=target.identity, loads=loads, **found)
    results.write(out)
    if len(store.done) > num_before:
        log_results(results)
    return results


def _start(each: EndpointConfig, config: BakeOffConfig, out: Path) -> AbstractContextManager[str]:
    """Start an engine by its launch line, or by that of a drafter, which is exported into `out`."""
    from specdec.engines import launch
    from specdec.engines.export import RECORD, Exported, export

    words, environment = each.launch, {"OMP_NUM_THREADS": str(config.run.threads)}
    if not words:
        # A plain engine is started like the first that drafts, but for the drafter.
        alike = [one for one in (each, *config.endpoints) if one.engine == each.engine]
        source = next((one for one in alike if one.drafter), None)
        if source is None or source.drafter is None:
            what = f"no arm of {each.engine} has a drafter, from which its command could be made"
            raise ValueError(f"{each.name!r}: {what}; give launch, a list of words")
        folder, run = out / "exports" / _slug(source.name), config.run
        if (folder / RECORD).is_file():
            made = read_model(Exported, folder / RECORD)
        else:
            how = run.target.path, source.num_draft_tokens, run.target.dtype or "auto"
            made = export(source.drafter, each.engine, folder, *how)
        words = made.launch if each.drafter else launch.without_drafter(made.launch)
        environment |= made.environment
    log = out / "logs" / f"{_slug(each.name)}.log"
    return launch.start([*words, *each.flags], engine=each.engine, log=log, env=environment)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _summarize(
    config: BakeOffConfig,
    target: ServedTarget,
    groups: Sequence[Group],
    done: Mapping[tuple[int, int, str], Call],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Baseline, choice, arms and groups; a call that is missing has failed."""
    run, endpoints = config.run, {each.name: each for each in config.endpoints}
    whole = Group("all", 0, [requests for group in groups for requests in group.calls])

    def call_of(repeat: int, number: int, name: str) -> Call:
        lost: list[Any] = [failed.get(name, "")] * len(whole.calls[number])
        return done.get((repeat, number, name)) or Call(lost, None, _NO_MEMORY)

    calls = {  # the arm without a name has failed: it stands where there is no plain one
        name: [[call_of(r, n, name) for r in range(run.repeats)] for n in range(len(whole.calls))]
        for name in ("", *endpoints)
    }
    tables = {name: table_of(each) for name, each in calls.items()}
    known = {name: speeds(table, {}) for name, table in tables.items()}
    fastest = sorted(endpoints, key=lambda name: -(known[name]["decode_tokens_per_s"] or 0))
    fastest = [name for name in fastest if known[name]["decode_tokens_per_s"]]
    # One that drafts without being said to is betrayed by its counters.
    plain = [n for n in fastest if not endpoints[n].drafter and known[n]["tau"] is None]
    baseline, against = [*plain, ""][0], [*plain, *fastest, ""][0]

    def figures(group: Group, first: int = 0) -> models.GroupResults:
        own = {name: each[first : first + len(group.calls)] for name, each in calls.items()}
        texts = {name: target.as_text(table_of(each)) for name, each in own.items()}
        differ = find_differences(group.requests, texts, run, None, [against])
        found = suite_group(run, group, own, differ, baseline)
        return found.model_copy(update={"arms": found.arms[1:]})

    def ratio(key: str, over: str, under: str) -> dict[str, Any]:
        return total_speed(key, [decode_work(tables[over])], [decode_work(tables[under])])

    arms = []
    for arm in figures(whole).arms:
        each = endpoints[arm.name]
        own_plain = next((name for name in plain if endpoints[name].engine == each.engine), "")
        served = [None, *(call.served for call in chain(*calls[arm.name]) if call.served)]
        told = ratio("speedup_vs_engine_plain", arm.name, own_plain) | {"served": served[-1]}
        told |= {"engine": each.engine, "drafter": each.drafter}
        arms.append(BakeOffArm(**vars(arm), **told))
    unsound = [arm.name for arm in arms if arm.failed or is_another(arm)]
    sound = [name for name in fastest if name not in unsound]
    lows = {name: ratio("x", sound[0], name)["x_ci"] or (0, 0) for name in sound}
    starts = accumulate((len(group.calls) for group in groups), initial=0)
    return {
        "baseline": baseline or None,
        "choice": [name for name, (low, _) in lows.items() if low <= 1],
        "arms": arms,
        "groups": list(map(figures, groups, starts)) if len(groups) > 1 else [],
    }


def is_another(arm: BakeOffArm) -> bool:
    """Greedy texts that mostly differ are another model's, or were sampled in another way."""
    return (arm.mismatches or 0) > arm.requests / 2


def check_bake_off(results: BakeOffResults) -> None:
    """Fail a bake-off of arms that are not comparable; else as `check_results`."""
    if others := [arm.name for arm in results.arms if is_another(arm)]:
        raise RuntimeError(
            f"most greedy texts of {', '.join(others)} are not those of the arms beside: they have "
            "another model, prompts or sampling, and are not to be compared"
        )
    check_results(results)


# --- Load ---


def read_loads(each: EndpointConfig) -> list[LoadFigures]:
    """Read JSON reports of GuideLLM 0.8, a row a benchmark."""
    try:
        return [
            _load_of(each.name, **benchmark)
            for path in each.load
            for benchmark in read_json(Path(path).expanduser())["benchmarks"]
        ]
    except (LookupError, TypeError, AttributeError) as error:
        what = f"is no report of GuideLLM 0.8 ({type(error).__name__}: {error})"
        raise ValueError(f"load {each.load} {what}; give its --output kind=json") from error


def _load_of(name: str, config: Any, metrics: Any, **_: Any) -> LoadFigures:
    def times(key: str, unit: float) -> dict[str, float]:
        found = metrics[key]["successful"]["percentiles"]
        return {each: found[each] * unit for each in ("p50", "p95", "p99")}

    strategy, totals = config["strategy"], metrics["request_totals"]
    amount = strategy.get("streams") or strategy.get("rate") or ""
    return LoadFigures(
        name=name,
        load=f"{strategy['type_']} {amount}".strip(),
        requests=totals["total"],
        failed=totals["errored"],
        tokens_per_s=metrics["output_tokens_per_second"]["successful"]["mean"],
        ttft_s=times("time_to_first_token_ms", 1e-3),
        itl_s=times("inter_token_latency_ms", 1e-3),
        latency_s=times("request_latency", 1),
    )
