"""A bake-off: servers, and engines started one after the other, asked for the same answers.

An endpoint that is measured alone is a bake-off of one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, field_validator

from specdec.bench import results as models
from specdec.bench.config import (
    BenchConfig,
    ConcurrentConfig,
    LongContextConfig,
    MultiTurnConfig,
    SamplingOptions,
    SingleTurnConfig,
    build_config,
    read_config,
)
from specdec.bench.figures import decode_work, runs_of, speeds
from specdec.bench.log import log_results
from specdec.bench.measure import PROMPT_ERRORS, Call
from specdec.bench.runner import Store, check_results, take_turns, warm_up
from specdec.bench.summary import find_differences, suite_group, table_of
from specdec.bench.workloads import Group, Progress, Request, fingerprint_of, make_groups
from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import TARGET, as_json
from specdec.common.config import Config, read_model, validated
from specdec.common.files import read_json
from specdec.common.provenance import MachineProvenance, machine
from specdec.common.stats import total_speed
from specdec.engine.text import encode
from specdec.engines.endpoints import EndpointArm, EndpointConfig, ServedTarget

_GROUPS = TypeAdapter(list[Group])
_NO_MEMORY = models.Memory(peak_rss_bytes=None, peak_device_bytes=None, cache_bytes=None)


class BakeOffConfig(Config):
    """A bench or a suite, and the endpoints that are asked, one request after the other."""

    run: BenchConfig | SingleTurnConfig | MultiTurnConfig | LongContextConfig
    endpoints: list[EndpointConfig] = Field(min_length=1)
    rows: ClassVar[int] = 1

    @field_validator("endpoints")
    @classmethod
    def _refuse_twice(cls, given: list[EndpointConfig]) -> list[EndpointConfig]:
        names = [each.name for each in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"endpoints: {twice[0]!r} is used twice; rename or drop one")
        return given


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


# --- Results ---


class BakeOffArm(models.SuiteArm):
    """An endpoint over all requests; plain is the fastest arm without a drafter."""

    engine: str
    drafter: Any
    served: str | None
    """model, version, and how prompts and answers went over the line; null if none did"""
    speedup_vs_engine_plain: float | None
    """the same over the fastest plain arm of its own engine"""
    speedup_vs_engine_plain_ci: models.Interval
    error: str | None
    """why it was not measured to its end"""


class LoadFigures(models.Record):
    """One benchmark of a GuideLLM report; figures are of the requests that succeeded."""

    name: str
    load: str
    requests: int
    failed: int
    tokens_per_s: float
    ttft_s: models.Percentiles
    itl_s: models.Percentiles
    latency_s: models.Percentiles


class BakeOffProvenance(MachineProvenance):
    """Configuration as resolved, and the machine that asked."""

    config: BakeOffConfig
    config_fingerprint: str


class BakeOffResults(models.Results):
    """bake-off.json of a bake-off, or of an endpoint alone."""

    FILE = "bake-off.json"
    NOUN = "request"

    schema_: Literal["specdec-bake-off-1"] = Field(default="specdec-bake-off-1", alias="schema")
    provenance: BakeOffProvenance
    target: TargetIdentity
    baseline: str | None
    """the fastest plain arm"""
    choice: list[str]
    """the fastest arm that answered all requests, and those that are not told from it"""
    arms: list[BakeOffArm]
    groups: list[models.GroupResults]
    """each group of a suite by itself; none where there is one"""
    loads: list[LoadFigures]


# --- The run ---


def run_bake_off(
    config: BakeOffConfig, out: Path, progress: Progress = lambda done, total, text: None
) -> BakeOffResults:
    """Measure what is not in the folder yet and write `bake-off.json` there.

    Servers that run take turns by call; an engine that is started has all its calls at once. One
    that fails is reported with its reason, and the others are measured.
    """
    endpoints, run = config.endpoints, config.run
    loads = [row for each in endpoints for file in each.load for row in read_load(each.name, file)]
    target: Any = ServedTarget(run.target)
    content = config.model_dump(mode="json")
    provenance = {"config": content, "config_fingerprint": fingerprint_of(content)}
    provenance |= machine(target)
    kept = {"name", "engine", "model", "drafter", "num_draft_tokens", "launch", "flags"}
    identity: dict[str, Any] = {key: provenance[key] for key in ("cpu", "cpu_count")}
    identity |= {"config": content["run"], TARGET: as_json(target.identity)}
    identity["endpoints"] = [each.model_dump(include=kept) for each in endpoints]
    failed: dict[str, str] = {}
    with Store(out, identity, provenance) as store:
        num_before = len(store.done)
        known = next((row["groups"] for row in store.rows() if "groups" in row), None)
        if known is None:
            target.answers = partial(_answers, config, out, target)
            known = [asdict(group) for group in make_groups(run, target, progress)]
            store.append({"groups": known})
        groups = _GROUPS.validate_python(known)
        total = sum(len(group.calls) for group in groups) * run.repeats * len(endpoints)

        def show(text: str) -> None:
            progress(len(store.done), total, text)

        running = [each for each in endpoints if each.url]
        for some in filter(None, [running, *([each] for each in endpoints if not each.url)]):
            turns = take_turns(groups, [each.name for each in some], run.repeats)
            missing = [turn for turn in turns if turn[0] not in store.done]
            with ExitStack() as stack:
                arms: dict[str, EndpointArm] = {}
                for each in some:
                    if all(key.arm != each.name for key, *_ in missing):
                        continue
                    try:
                        show(f"start of {each.name}")
                        arms[each.name] = stack.enter_context(_open(each, config, out, target))
                        warm_up({each.name: arms[each.name]}, groups, 1, show)
                    except (FileNotFoundError, ConnectionError, *PROMPT_ERRORS) as error:
                        failed[each.name] = str(error)
                for key, group, requests in missing:
                    if key.arm not in failed:
                        show(f"{key.arm}, repeat {key.repeat + 1}, {group}, call {key.call + 1}")
                        try:
                            rows = arms[key.arm](requests, lambda: None)
                        except (ValueError, ConnectionError) as error:
                            failed[key.arm] = str(error)
                            continue
                        served = arms[key.arm].served
                        store.add(key, Call(rows, None, _NO_MEMORY, served=served))
        is_new = len(store.done) > num_before
    found = _summarize(config, target, groups, store.done, failed)
    where = BakeOffProvenance(**store.provenance)
    results = BakeOffResults(provenance=where, target=target.identity, loads=loads, **found)
    results.write(out)
    if is_new:
        log_results(results)
    return results


@contextmanager
def _open(
    each: EndpointConfig, config: BakeOffConfig, out: Path, target: ServedTarget
) -> Iterator[EndpointArm]:
    """Make an arm; an engine that is started runs as long as the block."""
    from specdec.engines.launch import start

    with ExitStack() as stack:
        url = each.url
        if url is None:
            words, environment = launch_line(each, config, out)
            log = out / "logs" / f"{_slug(each.name)}.log"
            url = stack.enter_context(start(words, engine=each.engine, log=log, env=environment))
        yield EndpointArm(each, url, config.run.sampling, target)


def launch_line(
    each: EndpointConfig, config: BakeOffConfig, out: Path
) -> tuple[list[str], dict[str, str]]:
    """The words that start an engine, and its variables; a drafter is exported into `out`."""
    from specdec.engines.export import RECORD, Exported, export
    from specdec.engines.launch import without_drafter

    run, environment = config.run, {"OMP_NUM_THREADS": str(config.run.threads)}
    if each.launch:
        return [*each.launch, *each.flags], environment
    # A plain engine is started like the first that drafts, but for the drafter.
    drafting = [one for one in (each, *config.endpoints) if one.engine == each.engine]
    source = next((one for one in drafting if one.drafter), None)
    if source is None or source.drafter is None:
        raise ValueError(
            f"{each.name!r} has no drafter, nor has an arm of {each.engine} from whose command its "
            "own could be made; give launch, a list of words"
        )
    folder = out / "exports" / _slug(source.name)
    if (folder / RECORD).is_file():
        made = read_model(Exported, folder / RECORD)
    else:
        how = run.target.path, source.num_draft_tokens, run.target.dtype or "auto"
        made = export(source.drafter, each.engine, folder, *how)
    words = made.launch if each.drafter else without_drafter(made.launch)
    return [*words, *each.flags], {**environment, **made.environment}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _answers(
    config: BakeOffConfig, out: Path, target: Any, prompts: Sequence[Any], limit: int
) -> list[str]:
    """Greedy answers of the first endpoint, behind which later turns are asked."""
    run = config.run.model_copy(update={"sampling": SamplingOptions()})
    asked = [Request("", "", encode(each, target, n), limit, 0) for n, each in enumerate(prompts)]
    first = config.endpoints[0]
    with _open(first, config.model_copy(update={"run": run}), out, target) as arm:
        rows = arm(asked, lambda: None)
    if failed := [row for row in rows if isinstance(row, str)]:
        raise RuntimeError(f"{first.name!r} gives no answers for later turns: {failed[0]}")
    return [target.text(row.tokens) for row in runs_of(rows)]


# --- From calls to results ---


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
    everything = range(len(whole.calls))

    def calls_of(name: str, numbers: Sequence[int]) -> list[list[Call]]:
        lost = [Call([failed.get(name, "")] * len(each), None, _NO_MEMORY) for each in whole.calls]
        return [[done.get((r, n, name), lost[n]) for r in range(run.repeats)] for n in numbers]

    tables = {name: table_of(calls_of(name, everything)) for name in ("", *endpoints)}
    known = {name: speeds(table, {}) for name, table in tables.items()}
    speed = {name: found["decode_tokens_per_s"] or 0 for name, found in known.items()}

    def fastest_plain(*engines: str) -> str:
        """Its name; empty where there is none."""
        alike = [name for name, each in endpoints.items() if each.engine in engines and speed[name]]
        # One that drafts without being said to is betrayed by its counters.
        plain = [n for n in alike if not endpoints[n].drafter and known[n]["tau"] is None]
        return max(plain, key=lambda name: speed[name], default="")

    baseline = fastest_plain(*(each.engine for each in endpoints.values()))
    against = baseline or next((name for name in endpoints if speed[name]), "")

    def figures(group: Group, numbers: Sequence[int]) -> models.GroupResults:
        calls = {name: calls_of(name, numbers) for name in endpoints}
        texts = {name: target.as_text(table_of(each)) for name, each in calls.items()}
        differ = find_differences(group.requests, texts, run, None, [against] if against else [])
        return suite_group(run, group, calls, differ, calls_of(baseline, numbers))

    arms = []
    for arm in figures(whole, everything).arms:
        each, work = endpoints[arm.name], [decode_work(tables[arm.name])]
        plain = [decode_work(tables[fastest_plain(each.engine)])]
        own = [call.served for key, call in done.items() if key[2] == arm.name]
        told: dict[str, Any] = {
            "engine": each.engine,
            "drafter": each.drafter,
            "error": failed.get(arm.name),
        }
        told |= {"served": own[-1] if own else None}
        told |= total_speed("speedup_vs_engine_plain", work, plain)
        arms.append(BakeOffArm(**vars(arm), **told))
    places = iter(everything)
    shown = [figures(group, [*islice(places, len(group.calls))]) for group in groups]
    sound = [arm.name for arm in arms if not (arm.failed or is_another(arm))]
    choice = sorted(sound, key=lambda name: -speed[name])[:1]
    for name in [name for name in sound if name not in choice]:
        works = [[decode_work(tables[each])] for each in (choice[0], name)]
        low, _ = total_speed("ratio", *works)["ratio_ci"] or (0, 0)
        choice += [name] if low <= 1 else []
    more = {"choice": choice, "arms": arms, "groups": shown if len(shown) > 1 else []}
    return {"baseline": baseline or None, **more}


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


def read_load(name: str, path: str) -> list[LoadFigures]:
    """Read a JSON report of GuideLLM 0.8, a row a benchmark."""

    def row(config: Any, metrics: Any, **_: Any) -> LoadFigures:
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

    try:
        return [row(**each) for each in read_json(Path(path).expanduser())["benchmarks"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load {path!r} is no report of GuideLLM 0.8 ({type(error).__name__}: {error}); give "
            "the file of its --output kind=json"
        ) from error
