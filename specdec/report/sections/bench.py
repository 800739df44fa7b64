"""What was measured: arms, domains, speed against tau, acceptance by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.derived import (
    PART_NAMES,
    PARTS,
    Breakdown,
    Point,
    Waterfall,
    breakdown,
    by_group,
    is_map,
    points,
    vertical,
    waterfall,
)
from specdec.report.figures.acceptance import acceptance_by_depth
from specdec.report.figures.speed import (
    Interval,
    chain_lines,
    speed_against_tau,
    speed_by_group,
    time_bars,
    tree_heat_map,
    waterfalls,
)
from specdec.report.runs import Run, cells

NO_BENCH = "No bench among the runs: give the --out folder of specdec bench."

_OLD = (
    "{} is of the first version of results, which has no figures by prompt: intervals of speeds, "
    "and in a batch the speeds but for the mean of ratios, take another run."
)

_ARM = Column("name", "arm")
_HEADLINE = (
    Column("tau", "tau", 2, term="tau"),
    Column("decode_tokens_per_s", "tokens/s", 0, term="speed"),
    Column("speedup_vs_plain", "speed / plain", 2, "x", term="speedup"),
    Column("speedup_vs_hf", "speed / HF", 2, "x", term="hf"),
)
_BESIDE = (
    Column("end_to_end_speedup_vs_plain", "with prefill / plain", 2, "x", term="whole"),
    Column("mean_speedup_vs_plain", "mean ratio", 2, "x", term="mean_ratio"),
)
_COUNTS = (
    Column("accepted_percent", "accepted", 0, " %", term="accepted"),
    Column("loop_efficiency", "loop efficiency", 3, term="efficiency"),
    Column("prompts", "prompts", 0),
    Column("mismatches", "differ", 0, term="differ"),
    Column("failed", "failed", 0),
)


def results(runs: Sequence[Run]) -> Section:
    """Every arm of every bench and sweep."""
    section = Section("results", "Results")
    benches = [run for run in runs if run.kind == "bench"]
    sweeps = [run for run in runs if run.kind == "sweep"]
    if not benches and not sweeps:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        rows = [_row(arm) for arm in run.arms]
        columns = (_ARM, *_HEADLINE, *_BESIDE, *_COUNTS)
        section.tables.append(Table(f"arms-{place}", f"{run.label}: all prompts", columns, rows))
        section.text += _failures(run)
        if not run.is_bench(2):
            section.missing.append(_OLD.format(run.label))
    for place, run in enumerate(sweeps, start=1):
        section.tables.append(_sweep(run, place))
        section.missing += [
            f"The cell {each['name']} of {run.label} failed: {each['error']}"
            for each in run.data["cells"]
            if each.get("error")
        ]
    return section


def _row(arm: dict[str, Any]) -> dict[str, Any]:
    rate = arm["acceptance_rate"]
    return {**arm, "accepted_percent": rate and 100 * rate}


def _failures(run: Run) -> list[str]:
    return [
        f"{run.label}: {arm['failed']} of {arm['prompts']} prompts of {arm['name']} failed and are "
        f"not timed: {arm['failures'][0]['reason']}"
        for arm in run.arms
        if arm["failed"]
    ]


def _sweep(run: Run, place: int) -> Table:
    keys = list(dict.fromkeys(key for cell in run.data["cells"] for key in cell["settings"]))
    rows = [
        {**_row(arm), **{f"set {key}": str(value) for key, value in cell["settings"].items()}}
        for cell in run.data["cells"]
        for arm in cell["arms"]
    ]
    set_here = [Column(f"set {key}", key.rpartition(".")[2]) for key in keys]
    columns = (*set_here, _ARM, *_HEADLINE, *_BESIDE)
    return Table(f"sweep-{place}", f"{run.label}: every cell", columns, rows)


def domains(runs: Sequence[Run]) -> Section:
    """Every arm in every domain."""
    section = Section("domains", "By task")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        if run.is_bench(2):
            section.tables.append(_domains(run, place))
        else:
            section.missing.append(
                f"{run.label} is of the first version of results, which does not tell tasks apart; "
                "run it again."
            )
    return section


def _domains(run: Run, place: int) -> Table:
    names = dict.fromkeys(name for arm in run.arms for name in arm["domains"])
    rows = [
        {"domain": name, "name": arm["name"], **arm["domains"][name]}
        for name in names
        for arm in run.arms
        if name in arm["domains"]
    ]
    columns = (Column("domain", "task"), _ARM, Column("prompts", "prompts", 0), *_HEADLINE)
    return Table(f"domains-{place}", f"{run.label}: each task by itself", columns, rows)


def speed(runs: Sequence[Run]) -> Section:
    """A picture a bench."""
    section = Section("speed", "Speed against tau")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        arms = [arm for arm in run.arms if arm["tau"] and arm["speedup_vs_plain"]]
        if not arms:
            section.missing.append(f"{run.label} has no arm with a tau and a speed.")
            continue
        said = [f"{a['name']} {a['tau']:.2f} and {a['speedup_vs_plain']:.2f}x" for a in arms]
        section.figures.append(
            Figure(
                f"speed-{place}",
                f"{run.label}: what tau promises and what arrives. Bars are 95 % intervals over "
                "prompts.",
                f"Scatter plot of speed over plain decoding against tau. {'; '.join(said)}.",
                speed_against_tau(arms),
            )
        )
    return section


def acceptance(runs: Sequence[Run]) -> Section:
    """A picture and a table a bench."""
    section = Section("acceptance", "Acceptance by depth")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        arms = [arm for arm in run.arms if arm["per_depth"]]
        if not arms:
            section.missing.append(f"No arm of {run.label} drafted anything.")
            continue
        curves = [(a["name"], a["per_depth"], a["per_depth_conditional"]) for a in arms]
        alt = "; ".join(f"{a['name']} from {a['per_depth'][0]:.2f} at depth 1" for a in arms)
        section.figures.append(
            Figure(
                f"acceptance-{place}",
                f"{run.label}: above, of all steps (the sum is tau - 1); below, of the steps that "
                "tested the depth.",
                f"Two line plots of acceptance by depth. {alt}.",
                acceptance_by_depth(curves),
            )
        )
        section.tables.append(_depths(run, arms, place))
    return section


def _depths(run: Run, arms: Sequence[dict[str, Any]], place: int) -> Table:
    rows = []
    for arm in arms:
        for key, kind in (("per_depth", "all"), ("per_depth_conditional", "conditional")):
            values = {str(depth): value for depth, value in enumerate(arm[key], start=1)}
            rows.append({"name": arm["name"], "kind": kind, **values})
    deepest = max(len(arm["per_depth"]) for arm in arms)
    depths = [Column(str(depth), str(depth), 2) for depth in range(1, deepest + 1)]
    columns = (_ARM, Column("kind", "share of steps", term="conditional"), *depths)
    return Table(f"depths-{place}", f"{run.label}: acceptance by depth", columns, rows)


def measured(runs: Sequence[Run]) -> list[Run]:
    """Benches, and the cells of sweeps as benches."""
    found = []
    for run in runs:
        found += cells(run) if run.kind == "sweep" else [run] if run.kind == "bench" else []
    return found


def settings(runs: Sequence[Run]) -> Section:
    """A column a run, a row a setting."""
    section = Section("runs", "Runs and settings")
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for each in facts for name in each))
    rows = [{"name": name, **_values(name, facts)} for name in names]
    columns = [Column("name", "setting"), *(_column(i, run) for i, run in enumerate(runs))]
    section.tables.append(Table("settings", "Provenance and settings", columns, rows))
    dirty = [run.label for run in runs if run.provenance.get("git_dirty")]
    if dirty:
        section.text.append(
            f"Run with changes that no commit holds: {', '.join(dirty)}. Nobody can repeat these "
            "figures exactly."
        )
    return section


def _column(place: int, run: Run) -> Column:
    return Column(str(place), f"{run.label} ({run.kind})")


def _values(name: str, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {str(place): each.get(name) for place, each in enumerate(facts)}


def _facts(run: Run) -> dict[str, Any]:
    where = run.provenance
    return {
        "schema": run.data["schema"],
        "date": where.get("date"),
        "commit": _commit(where),
        "command": where.get("command"),
        "target": _target(run),
        "dtype": _dtype(where),
        "device": _device(where),
        "threads": where.get("threads"),
        "load at the start": _load(where.get("load_average")),
        **_configured(run.config),
        "versions": ", ".join(f"{k} {v}" for k, v in (where.get("versions") or {}).items()) or None,
    }


def _configured(config: dict[str, Any]) -> dict[str, Any]:
    prompts, sampling = config.get("prompts"), config.get("sampling")
    return {
        "prompts": prompts and f"{prompts['num']} of {_last(prompts['source'])}",
        "sampling": sampling and _sampling(sampling),
        **{
            name.replace("_", " "): config.get(name)
            for name in ("rule", "batch_size", "max_new_tokens", "repeats", "seed")
        },
    }


def _sampling(sampling: dict[str, Any]) -> str:
    """Temperature, and what is not off."""
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    others = {k: v for k, v in sampling.items() if k != "temperature" and v != off.get(k, 0)}
    said = [f"T = {sampling.get('temperature', 0):g}", *(f"{k} {v}" for k, v in others.items())]
    return ", ".join(said)


def _commit(where: dict[str, Any]) -> str | None:
    commit = where.get("git_commit")
    return commit and commit[:12] + (" with changes" if where.get("git_dirty") else "")


def _target(run: Run) -> str | None:
    identity = run.identity or {}
    name = identity.get("name") or (run.config.get("target") or {}).get("path")
    marks = [f"{k} {identity[k][:8]}" for k in ("weights", "tokenizer") if identity.get(k)]
    return name and _last(name) + (f" ({', '.join(marks)})" if marks else "")


def _dtype(where: dict[str, Any]) -> str | None:
    dtype = where.get("dtype")
    return dtype and dtype + (", quantised" if where.get("quantized") else "")


def _device(where: dict[str, Any]) -> str | None:
    device, cpu = where.get("device"), where.get("cpu")
    said = f" ({cpu}, {where.get('cpu_count')} cores)" if cpu else ""
    return device and device + said


def _load(average: float | None) -> str | None:
    return None if average is None else f"{average:.1f}"


def _last(path: str) -> str:
    """A hub id whole; of a path its last part, for others do not share our disks."""
    return Path(path).name if path.count("/") != 1 or path[0] in "./~" else path


def shapes(runs: Sequence[Run]) -> Section:
    """A heat map of every strategy's trees and a line of its chains, measured and predicted."""
    section = Section("shapes", "Draft shape against speed")
    for run in measured(runs):
        _draw(section, points(run.arms, "speedup_vs_plain"), run.label, "measured")
    for plan in (run for run in runs if run.kind == "plan"):
        configurations = plan.data["configurations"]
        for size in sorted({each["batch_size"] for each in configurations}):
            here = [each for each in configurations if each["batch_size"] == size]
            label = f"{plan.label}, batch {size}"
            _draw(section, points(here, "predicted_speedup"), label, "predicted")
    if not section.figures:
        section.missing.append(
            "No strategy in two shapes: give a sweep over its options, or the folder of specdec "
            "plan."
        )
    return section


def _draw(section: Section, found: Sequence[Point], label: str, origin: str) -> None:
    trees = by_group(point for point in found if not point.is_chain)
    chains = by_group(point for point in found if point.is_chain)
    for members in filter(is_map, trees.values()):
        section.figures.append(_heat_map(members, label, origin, len(section.figures) + 1))
    if chains:
        groups = list(chains.values())
        section.figures.append(_chains(groups, label, origin, len(section.figures) + 1))


def _heat_map(members: Sequence[Point], label: str, origin: str, place: int) -> Figure:
    best = max(members, key=lambda point: point.speedup)
    other = {"nodes": "node budget", "width": "width"}[vertical(members)]
    return Figure(
        f"shape-{place}",
        f"{label}: {origin} speed over plain decoding of {members[0].label}, trees by depth and "
        f"{other}; the fastest is framed. Shapes that share a cell show the faster one.",
        f"Heat map of {len(members)} trees of {members[0].label}. The fastest, {best.name}, "
        f"reaches {best.speedup:.2f}x with depth {best.depth}, width {best.width} and "
        f"{best.nodes} nodes.",
        tree_heat_map(members),
    )


def _chains(groups: Sequence[Sequence[Point]], label: str, origin: str, place: int) -> Figure:
    best = [max(members, key=lambda point: point.speedup) for members in groups]
    said = "; ".join(f"{b.label} best at {b.length}: {b.speedup:.2f}x" for b in best)
    return Figure(
        f"shape-{place}",
        f"{label}: {origin} speed over plain decoding by the length of a chain, or by the node "
        "budget of a strategy that has no depth.",
        f"Lines of speed against draft length. {said}.",
        chain_lines(groups),
    )


_COLUMNS = (
    Column("group", "group"),
    Column("name", "arm"),
    Column("requests", "requests", 0),
    Column("tau", "tau", 2, term="tau"),
    Column("decode_tokens_per_s", "tokens/s", 0, term="speed"),
    Column("speedup_vs_plain", "speed / plain", 2, "x", term="speedup"),
    *(
        Column(f"{kind} {part}", f"{title} {part}, ms", 1)
        for kind, title in (("ttft_s", "TTFT"), ("itl_s", "ITL"))
        for part in ("p50", "p95", "p99")
    ),
    Column("failed", "failed", 0),
)
_LOAD = (
    Column("group", "group"),
    Column("name", "arm"),
    Column("users", "users", 0),
    Column("tokens_per_s", "tokens/s of all", 0),
    Column("tokens_per_s_vs_plain", "of all / plain", 2, "x"),
    Column("user_tokens_per_s_mean", "tokens/s of a user", 1),
    Column("user_speed_vs_plain", "of a user / plain", 2, "x"),
    Column("jain_index", "Jain's fairness", 3),
    Column("worst_over_mean", "slowest / mean", 2),
    Column("queue p95", "queue p95, ms", 1),
    Column("cache_mb", "cache, MB", 1),
    Column("power_w", "power, W", 0),
)


def suite(runs: Sequence[Run]) -> Section:
    """Latency by group, and the load where there were users."""
    section = Section("suite", "Suites")
    suites = [run for run in runs if run.kind == "suite"]
    if not suites:
        section.missing.append(
            "No suite among the runs: give the --out folder of specdec bench for a suite."
        )
    for place, run in enumerate(suites, start=1):
        rows = [_row_of_suite(group, arm) for group in run.data["groups"] for arm in group["arms"]]
        _add_figure(section, run, place)
        caption = f"{run.label}: {run.data['suite'].replace('_', ' ')}"
        section.tables.append(Table(f"suite-{place}", caption, _COLUMNS, rows))
        loaded = [row for row in rows if row.get("users")]
        if loaded:
            caption = f"{run.label}: users at the same time"
            section.tables.append(Table(f"load-{place}", caption, _LOAD, loaded))
    return section


def _row_of_suite(group: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    cache = arm["memory"]["cache_bytes"]
    return {
        **arm,
        **(arm["load"] or {}),
        "group": group["name"],
        **_milliseconds("ttft_s", arm["ttft_s"]),
        **_milliseconds("itl_s", arm["itl_s"]),
        **_milliseconds("queue", arm["queue_s"]),
        "cache_mb": cache and cache / 1e6,
        "power_w": arm["power"]["power_w"],
    }


def _milliseconds(key: str, seconds: dict[str, float]) -> dict[str, float]:
    return {f"{key} {part}": 1000 * value for part, value in seconds.items()}


def _add_figure(section: Section, run: Run, place: int) -> None:
    """Speed of every arm by group, where there is more than one."""
    groups = run.data["groups"]
    names = [group["name"] for group in groups]
    lines: dict[str, list[float | None]] = {}
    intervals: dict[str, list[Interval]] = {}
    for group in groups:
        for arm in group["arms"]:
            if arm["name"] != "plain":
                lines.setdefault(arm["name"], []).append(arm["speedup_vs_plain"])
                intervals.setdefault(arm["name"], []).append(arm.get("speedup_vs_plain_ci"))
    if len(names) < 2 or not any(value for values in lines.values() for value in values):
        return
    said = "; ".join(
        f"{name} from {_first(values):.2f}x to {_first(values[::-1]):.2f}x"
        for name, values in lines.items()
        if any(values)
    )
    section.figures.append(
        Figure(
            f"suite-{place}",
            f"{run.label}: speed over plain decoding by group, with 95 % intervals over requests.",
            f"Lines of speed over plain decoding by group, from {names[0]} to {names[-1]}. {said}.",
            speed_by_group(names, lines, intervals),
        )
    )


def _first(values: Sequence[float | None]) -> float:
    return next(value for value in values if value is not None)


_OLD_of_time = (
    "{} is of the first version of results, which did not time verify and commit: both are in the "
    "rest of the loop. The number of steps is derived from tau and tokens."
)


def time(runs: Sequence[Run]) -> Section:
    """Milliseconds of a token by part."""
    section = Section("time", "Where the time went")
    section.text.append(
        "Decoding without prefill, milliseconds per emitted token; a batch's time is shared by "
        "its rows. Target and draft are forwards, verify is the processing of logits and the "
        "judging, commit the keeping of what was accepted."
    )
    for place, (run, found) in enumerate(_timed(runs, section), start=1):
        alt = "; ".join(f"{each.name} {sum(each.token_ms.values()):.2f} ms" for each in found)
        section.figures.append(
            Figure(
                f"time-{place}",
                f"{run.label}: milliseconds per emitted token.",
                f"Stacked bars of the time of a token by part. In all: {alt}.",
                time_bars(found),
            )
        )
        section.tables.append(_times(run, found, place))
    return section


def _times(run: Run, found: Sequence[Breakdown], place: int) -> Table:
    parts = [part for part in PARTS if any(part in each.step_ms for each in found)]
    rows = [
        {
            "name": each.name,
            "tau": each.tau,
            **each.token_ms,
            "token": sum(each.token_ms.values()),
            "step": sum(each.step_ms.values()),
        }
        for each in found
    ]
    columns = (
        Column("name", "arm"),
        Column("tau", "tau", 2, term="tau"),
        *(Column(part, PART_NAMES[part], 3) for part in parts),
        Column("token", "token in all", 3),
        Column("step", "step in all", 3),
    )
    return Table(f"times-{place}", f"{run.label}: ms per token, and per step", columns, rows)


def speedup(runs: Sequence[Run]) -> Section:
    """From tau down to the measured ratio."""
    section = Section("speedup", "Where the speedup went")
    section.text.append(
        "If a step cost what a step of plain decoding costs, and nothing else, the speedup would "
        "be tau. Each part of the step is then added to that cost in the order shown; its factor "
        "is the cost before over the cost after. The last factor is what lies outside of steps: "
        "the time between them, in a batch the wait for other rows, and that the speedup takes "
        "each prompt's median over repeats. Tau times all factors is the measured speedup."
    )
    for place, (run, found) in enumerate(_timed(runs, section), start=1):
        falls = _waterfalls(run, found)
        if not falls:
            section.missing.append(f"{run.label} has no arm with a speedup to explain.")
            continue
        alt = "; ".join(f"{each.name} from {each.tau:.2f} to {each.measured:.2f}" for each in falls)
        section.figures.append(
            Figure(
                f"speedup-{place}",
                f"{run.label}: from tau to the measured speedup.",
                f"Waterfalls, a panel an arm. {alt}.",
                waterfalls(falls),
            )
        )
        section.tables.append(_factors(run, falls, place))
    return section


def _waterfalls(run: Run, found: Sequence[Breakdown]) -> list[Waterfall]:
    arms = {arm["name"]: arm for arm in run.arms}
    plain = next((each for each in found if each.name == "plain"), None)
    if plain is None:
        return []
    falls = [waterfall(arms[each.name], each, plain) for each in found if each.name != "plain"]
    return [fall for fall in falls if fall is not None]


def _factors(run: Run, falls: Sequence[Waterfall], place: int) -> Table:
    names = list(dict.fromkeys(name for fall in falls for name, _ in fall.factors))
    rows = [
        {"name": f.name, "tau": f.tau, **dict(f.factors), "measured": f.measured} for f in falls
    ]
    columns = (
        Column("name", "arm"),
        Column("tau", "tau", 3, term="tau"),
        *(Column(name, f"x {name}", 3) for name in names),
        Column("measured", "= measured", 3, "x", term="speedup"),
    )
    return Table(f"factors-{place}", f"{run.label}: factors of the speedup", columns, rows)


def _timed(runs: Sequence[Run], section: Section) -> list[tuple[Run, list[Breakdown]]]:
    """Benches with their breakdowns; what cannot be broken down is told in the section."""
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    timed = []
    for run in benches:
        found = [breakdown(arm, run.config["repeats"]) for arm in run.arms]
        kept = [each for each in found if each is not None]
        without = [arm["name"] for arm, each in zip(run.arms, found, strict=True) if each is None]
        if without:
            section.missing.append(
                f"{run.label}: no times of steps of {', '.join(without)}: the loop is not ours."
            )
        if not run.is_bench(2):
            section.missing.append(_OLD_of_time.format(run.label))
        if kept:
            timed.append((run, kept))
    return timed
