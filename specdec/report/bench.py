"""Benches, sweeps and suites: arms, tasks, speed, acceptance, waiting, and where the time went."""

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from specdec.bench.config import BenchConfig, in_words, short_names
from specdec.bench.log import LogEntry, entry_of
from specdec.bench.results import BenchArm, SuiteResults, SweepResults, fastest_plain, over_fastest
from specdec.common.files import replace_file
from specdec.engines.results import BakeOffResults
from specdec.report import figures
from specdec.report.document import AbsentError, Section
from specdec.report.runs import Run, last_part, read_cells, title_of
from specdec.report.style import to_png
from specdec.report.tables import Column, Table, columns, words

LOGGED = ("bench", "suite", "bake-off")  # kinds of run that a performance log has lines of


def tables(results: Any, label: str = "") -> list[Table]:
    """Show one row an arm, of a suite in every group: speeds, then waiting times."""
    title = label + title_of(results)
    if isinstance(results, SuiteResults):
        return _suite_tables(results, title)
    if isinstance(results, BakeOffResults):
        return _bake_off_tables(results, title)
    gaps = [each.top2_gap for arm in results.arms for each in arm.differences]
    known = [gap for gap in gaps if gap is not None]
    apart = f"the two best logits where outputs part are at most {max(known, default=0):.2g} apart"
    legend = [*results.provenance.notes, *([apart] if known else [])]
    fastest = fastest_plain(results.arms)
    rows = [{**_row(arm), **over_fastest(fastest, arm)} for arm in results.arms]
    alarms = [*results.provenance.alarms, *eager_baselines(results.arms)]
    title += f"; the fastest plain arm: {fastest}"
    return [Table("arms", title, rows, _first_ratio(fastest), legend, alarms=alarms)]


def _first_ratio(*fastest: str) -> list[Column]:
    """Add a column for that ratio, unless the one over plain is it."""
    return [] if set(fastest) == {"plain"} else columns("vs_fastest")


def eager_baselines(arms: Sequence[BenchArm]) -> list[str]:
    """Warn of compiled arms beside a baseline that is not."""
    compiled = [arm.name for arm in arms if arm.compile_mode != "eager"]
    names = [arm.name for arm in arms if arm.name not in compiled]
    eager = [name for name in names if name in BenchConfig.baselines]
    if not (eager and compiled):
        return []
    return [
        f"compiled arms ({', '.join(compiled)}) stand beside an eager baseline "
        f"({', '.join(eager)}): ratios to it are not the gain of speculation alone"
    ]


def _row(arm: Any) -> dict[str, Any]:
    """Give the figures of an arm; one that drafts nothing has no share of accepted tokens."""
    return {**vars(arm), "acceptance_rate": arm.acceptance_rate or None}


def _suite_tables(results: SuiteResults, title: str) -> list[Table]:
    arms = [arm for group in results.groups for arm in group.arms]
    notes = ["power: not measured, which takes a CUDA device and nvidia-ml-py"]
    if any(arm.power.energy_j is not None for arm in arms):
        notes = []
    notes += results.provenance.notes
    kind = "concurrent " if results.suite == "concurrent" else ""
    group = [Column("group", words()["suites"][results.suite]["group"])]
    rows = [{"group": group.name, **_row(arm)} for group in results.groups for arm in group.arms]
    later = f"{title}; waiting times"
    return [
        Table("suite", title, rows, group, notes, 1, f"{kind}suite", results.provenance.alarms),
        Table("waiting", later, rows, group, num_grouped=1, like=f"{kind}waiting"),
    ]


def _bake_off_tables(results: BakeOffResults, title: str) -> list[Table]:
    rows, group = [_row(arm) for arm in results.arms], [Column("group", "group")]
    choice = ", not told from ".join(results.choice) or "none, for all failed"
    own = [{"group": each.name, **_row(arm)} for each in results.groups for arm in each.arms]
    shown = [
        Table("bake-off", f"{title}; the fastest: {choice}", rows),
        Table("waiting", f"{title}; waiting times", rows),
        Table("suite", f"{title}; by group", own, group, num_grouped=1),
        Table("load", "load, measured by GuideLLM", results.loads),
    ]
    return [table for table in shown if table.rows]


def draw(results: Any) -> Any:
    """Draw the arms of a bench, or the figures of a suite that matter most, a panel each."""
    if not isinstance(results, SuiteResults):
        return figures.bench_panels(results)
    found = words()["suites"][results.suite]
    return figures.group_panels(results, columns(found["panels"]), found["group"])


def plot(results: Any, path: Path) -> None:
    replace_file(path, to_png(draw(results)))


def sweep_table(sweep: SweepResults, label: str = "") -> Table:
    """Show one row an arm of a cell, with the domains where there are several."""
    titles = short_names(list(sweep.cells[0].settings))
    arms = [arm for cell in sweep.cells for arm in cell.arms]
    domains = list(dict.fromkeys(name for arm in arms for name in arm.domains))
    if all(len(arm.domains) < 2 for arm in arms):
        domains = []
    rows = []
    for cell in sweep.cells:
        settings = {key: last_part(in_words(value)) for key, value in cell.settings.items()}
        for arm in cell.arms:
            shares = {f"domain {name}": _domain(arm, name) for name in domains}
            first = over_fastest(fastest_plain(cell.arms), arm)
            rows.append({**settings, **vars(arm), **first, **shares})
        if not cell.arms:  # what failed before it measured anything keeps its place in the table
            rows.append({**settings, "name": "failed"})
    fastest = [fastest_plain(cell.arms) for cell in sweep.cells]
    shown = [
        *(Column(key, title.replace("_", "\n")) for key, title in titles.items()),
        *columns("arm tau speed"),
        *_first_ratio(*fastest),
        *columns("vs_plain vs_hf"),
        *(Column(f"domain {name}", name, is_optional=True) for name in domains),
    ]
    by_domain = "; by domain: tau and speed / plain decoding" if domains else ""
    caption = f"{label}{len(sweep.cells)} cells{by_domain}"
    caption += f"; the fastest plain arm: {', '.join(dict.fromkeys(fastest))}"
    alarms = [
        f"{cell.name}: {alarm}" for cell in sweep.cells for alarm in eager_baselines(cell.arms)
    ]
    return Table("sweep", caption, rows, shown, num_grouped=len(titles), alarms=alarms)


def _domain(arm: Any, name: str) -> str | None:
    found = arm.domains.get(name)
    return found and "  ".join(
        "-" if x is None else f"{x:.2f}" for x in (found.tau, found.speedup_vs_plain)
    )


def add_results(section: Section, run: Run) -> None:
    if run.kind == "sweep":
        section.show(sweep_table(run.data, f"{run.label}: "))
        section.missing += [
            f"The cell {cell.name} of {run.label} failed: {cell.error}"
            for cell in run.data.cells
            if cell.error
        ]
        return
    noun = run.data.NOUN
    section.show(*tables(run.data, f"{run.label}: "))
    section.text += [
        f"{run.label}: {arm.failed} of {getattr(arm, f'{noun}s')} {noun}s of {arm.name} failed and "
        f"are not timed: {arm.failures[0].reason}"
        for arm in run.data.arms
        if arm.failed
    ]
    if noun == "prompt" and all(arm.per_prompt is None for arm in run.data.arms):
        section.missing.append(
            f"{run.label} holds no figures by prompt or task, nor times of verify and commit: for "
            "intervals of speeds, and in a batch for speeds but the mean ratio, run it again."
        )


def _best(entry: LogEntry) -> dict[str, Any]:
    """Give a line of the log with the arm that gains most over the fastest plain one."""
    speeds = {arm["name"]: arm["tokens_per_s"] for arm in entry.arms}
    plain = BenchConfig.baselines
    gains = [a for a in entry.arms if a.get("speedup") and a["name"].split(" in ")[0] not in plain]
    best = max(gains, key=lambda arm: arm["speedup"], default={})
    when = {"date": entry.date[:16].replace("T", " ")}
    return {**vars(entry), **when, **best, "plain_speed": speeds.get(best.get("over"))}


def add_summary(section: Section, runs: Sequence[Run]) -> None:
    """Give the best arm of each bench, suite and bake-off, and of the best cell of a sweep."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        cells = read_cells(run) if run.kind == "sweep" else [run] if run.kind in LOGGED else []
        found = [{"run": cell.label, **_best(entry_of(cell.data))} for cell in cells]
        rows += sorted(found, key=lambda row: row.get("speedup", 0))[-1:]
    rows.sort(key=lambda row: row["date"], reverse=True)
    if rows:
        section.show(Table("summary", "The best arm of each run, newest first", rows))


def add_log(section: Section, runs: Sequence[Run]) -> None:
    """List benches and lines of logs, newest first, and draw settings that have several dates."""
    found = [(run.label, entry) for run in runs if run.kind == "log" for entry in run.data.entries]
    found += [(run.label, entry_of(run.data)) for run in runs if run.kind in LOGGED]
    if len(found) < 2 and not any(run.kind == "log" for run in runs):
        return
    found.sort(key=lambda each: each[1].date)
    settings: dict[str, list[LogEntry]] = {}
    for _, entry in found:
        settings.setdefault(entry.setting, []).append(entry)
    for entries in settings.values():
        if len(entries) > 1:
            png = figures.over_time(entries)
            section.draw("log", png, entries[-1:], label=entries[0].label)
    rows = [{"run": label, **_best(entry)} for label, entry in reversed(found)]
    section.show(Table("index", "Every bench, newest first", rows))
    arms = [{**_best(entry), **arm} for entry in chain(*settings.values()) for arm in entry.arms]
    section.show(Table("log", "Every arm of every bench, by setting", arms))


def add_domains(section: Section, run: Run) -> None:
    rows = [
        {"domain": name, "arm": arm.name, **vars(arm.domains[name])}
        for name in dict.fromkeys(name for arm in run.data.arms for name in arm.domains)
        for arm in run.data.arms
        if name in arm.domains
    ]
    if not rows:
        raise AbsentError(f"{run.label} does not tell tasks apart; run it again.")
    section.show(Table("domains", f"{run.label}: each task by itself", rows))


def add_speed(section: Section, run: Run) -> None:
    arms = [arm for arm in run.data.arms if arm.tau and arm.speedup_vs_plain]
    if not arms:
        raise AbsentError(f"{run.label} has no arm with a tau and a speed.")
    section.draw("speed", figures.speed_against_tau(arms), arms, label=run.label)


def add_acceptance(section: Section, run: Run) -> None:
    arms = [arm for arm in run.data.arms if arm.per_depth]
    if not arms:
        raise AbsentError(f"No arm of {run.label} drafted anything.")
    curves = [(arm.name, arm.per_depth, arm.per_depth_conditional) for arm in arms]
    section.draw("acceptance", figures.acceptance_by_depth(curves), curves, label=run.label)
    rows = [
        {"name": name, "kind": kind, **{str(n): v for n, v in enumerate(values, start=1)}}
        for name, *both in curves
        for kind, values in zip(("all", "conditional"), both, strict=True)
    ]
    deepest = max(len(whole) for _, whole, _ in curves)
    depths = [Column(str(depth), str(depth), 2) for depth in range(1, deepest + 1)]
    section.show(Table("depths", f"{run.label}: acceptance by depth", rows, depths))


def add_suite(section: Section, run: Run) -> None:
    section.show(*tables(run.data, f"{run.label}: "))
    groups = run.data.groups
    if len(groups) > 1:
        ends = {"first": groups[0].name, "last": groups[-1].name}
        section.draw("suite", to_png(draw(run.data)), label=run.label, **ends)


# --- Where the time went, and the speedup ---


def step_ms(arm: Any, repeats: int) -> dict[str, float]:
    """Give milliseconds of a step by part, a batch's shared by its rows; empty if not timed."""
    steps = count_steps(arm, repeats)
    if not steps or not arm.tau or not arm.time_s.wall:
        return {}
    times = {part: getattr(arm.time_s, part) for part in words()["parts"]}
    return {part: 1000 * time / steps for part, time in times.items() if time is not None}


def count_steps(arm: Any, repeats: int) -> float:
    """Count verify steps of all repeats; without figures by prompt, from T - 1 = tau S of each."""
    if arm.per_prompt:
        return sum(each.steps for each in arm.per_prompt if each is not None)
    return repeats * (arm.tokens - arm.prompts + arm.failed) / arm.tau if arm.tau else 0


def speedup_factors(arm: Any, ours: Mapping[str, float], plain: Mapping[str, float]) -> Any:
    """Split the speedup of an arm into factors of its tau, by milliseconds of a step.

    Each part is added to the cost of a plain step in turn, and its factor is the cost before over
    the cost after. The last one holds what is outside of steps: the time between them, in a batch
    the wait for other rows, and that a prompt counts by the median of its repeats.
    """
    cost = sum(plain.values())
    factors = {}
    for part in ours:
        more = cost + ours[part] - plain.get(part, 0.0)
        factors[words()["parts"][part]] = cost / more
        cost = more
    factors["outside of steps"] = arm.speedup_vs_plain / (arm.tau * prod(factors.values()))
    return factors


def add_time(section: Section, run: Run) -> None:
    rows, without = [], []
    for arm in run.data.arms:
        step = step_ms(arm, run.config["repeats"])
        if step:
            token = {part: value / arm.tau for part, value in step.items()}
            sums = {"token": sum(token.values()), "step": sum(step.values())}
            rows.append({"name": arm.name, "tau": arm.tau, **token, **sums})
        else:
            without.append(arm.name)
    if rows:
        png = figures.time_bars({row["name"]: row for row in rows})
        section.draw("time", png, rows, label=run.label)
        parts = [Column(part, name, 3, is_optional=True) for part, name in words()["parts"].items()]
        section.show(Table("times", f"{run.label}: ms per token, and per step", rows, parts))
    if without:
        section.missing.append(
            f"{run.label}: no times of steps of {', '.join(without)}: the loop is not ours."
        )


def add_speedup(section: Section, run: Run) -> None:
    """Show the way from tau down to the measured speedup."""
    arms = {arm.name: arm for arm in run.data.arms}
    steps = {name: step_ms(arm, run.config["repeats"]) for name, arm in arms.items()}
    plain = steps.pop("plain", None)
    falls = [
        {
            "name": name,
            "tau": arms[name].tau,
            "factors": speedup_factors(arms[name], ours, plain),
            "measured": arms[name].speedup_vs_plain,
        }
        for name, ours in steps.items()
        if ours and plain and arms[name].speedup_vs_plain is not None
    ]
    if not falls:
        raise AbsentError(f"{run.label} has no arm with a speedup to explain.")
    section.draw("speedup", figures.waterfalls(falls), falls, label=run.label)
    factors = [Column(f"factors.{name}", f"x {name}", 3) for name in falls[0]["factors"]]
    section.show(Table("factors", f"{run.label}: factors of the speedup", falls, factors))
