"""Sections of plans and estimates: choice, schedule, draft shapes, predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from specdec.bench.results import BenchArm, BenchResults
from specdec.planning.results import Configuration, Plan
from specdec.planning.roofline import Estimate
from specdec.report.compare import PLAN_FIELDS, find_differences
from specdec.report.document import Section
from specdec.report.figures.shapes import (
    chain_lines,
    estimated_speed,
    predicted_against_measured,
    tree_heat_map,
)
from specdec.report.runs import Run, read_cells
from specdec.report.shapes import Point, find_points, group_points, is_map, same_key, vertical
from specdec.report.tables import Column, Table

_STEPS_ARE = Column("steps", "steps\nare")


def plan_table(plan: Plan, label: str = "") -> Table:
    """Show the choice and the runners-up."""
    places = ["choice", *(str(place) for place in range(2, 2 + len(plan.runners_up)))]
    parts = {"wall": "step\nms", "draft": "draft\nms", "target": "target\nms", "other": "other\nms"}
    return Table(
        id="choice",
        caption=f"{label}plan for batch size {plan.choice.batch_size}: predictions from measured "
        f"costs and the acceptance of {plan.workload.tokens} tokens",
        columns=[
            *(Column("place", ""), Column("name", "configuration")),
            *(Column("type", "type", is_wide=True), Column("options", "options", is_wide=True)),
            Column("predicted_tau", "tau", 2, term="tau", rank=1),
            Column("predicted_speedup", "vs plain", 2, term="speedup", rank=2),
            _STEPS_ARE,
            *(Column(f"step_ms.{part}", title, 2) for part, title in parts.items()),
        ],
        rows=[
            {"place": place, "steps": timed_or_fitted(each), **vars(each)}
            for place, each in zip(places, [plan.choice, *plan.runners_up], strict=True)
        ],
        legend=[
            "tau: from acceptance; step: milliseconds of draft, target and everything else, timed "
            "as it is or fitted to other shapes",
            *not_trusted(plan),
        ],
    )


def timed_or_fitted(configuration: Any) -> str:
    """Say where the times of a configuration's steps come from."""
    return "timed" if configuration.is_timed else "fitted"


def not_trusted(plan: Plan) -> list[str]:
    """Warn of a plan whose times a busy machine made; an old one does not say."""
    if plan.trust is None or plan.trust.is_trusted:
        return []
    return [
        f"its times are not to be trusted: {'; '.join(plan.trust.reasons)}; plan again, in a new "
        "folder, with nothing else running"
    ]


def schedule_table(plan: Plan, label: str = "") -> Table:
    """Show the draft length of every batch size."""
    best = {(each.batch_size, each.nodes): each for each in plan.schedule_predictions}
    rows = []
    for size, nodes in sorted(plan.schedule.items()):
        found = best.get((size, nodes))
        steps = timed_or_fitted(found) if found else "timed"
        gain = found.predicted_speedup if found else 1.0
        rows.append({"batch": f"from {size}", "nodes": nodes, "gain": gain, "steps": steps})
    columns = [Column("batch", "batch size"), Column("nodes", "nodes", 0)]
    columns += [Column("gain", "vs plain", 2, term="speedup"), _STEPS_ARE]
    caption = f"{label}nodes to draft by batch size (0: plain decoding), {plan.controller.drafter}"
    return Table(id="schedule", caption=caption, columns=columns, rows=rows)


def costs_table(plan: Plan, label: str = "") -> Table:
    """Show what the fits leave over."""
    rows = []
    for size, fit in plan.costs.forward.items():
        chains = [p for p in plan.costs.points if p.batch_size == size and not p.is_tree]
        rows.append(("target forward", size, len(chains), fit.chain.residuals))
    for each in plan.costs.drafters:
        what = f"step with {each.drafter}"
        rows.append((what, each.batch_size, len(each.points), each.residuals))
    columns = [
        *(Column("what", "what"), Column("batch", "batch", 0), Column("points", "points", 0)),
        Column("errors.median", "median error", 1, "%", scale=100),
        Column("errors.largest", "largest", 1, "%", scale=100),
    ]
    return Table(
        id="costs",
        caption=f"{label}fits of measured times; errors are relative to the measured time",
        columns=columns,
        rows=[dict(zip(("what", "batch", "points", "errors"), row, strict=True)) for row in rows],
    )


def estimate_table(estimate: Estimate, label: str = "") -> Table:
    """Show an estimate's drafters at their best draft lengths."""
    return Table(
        id="estimate",
        caption=f"{label}ESTIMATE from stated parameters: nothing here was measured",
        columns=[
            *(Column("name", "drafter"), Column("batch_size", "batch", 0)),
            Column("alpha", "alpha,\ngiven", term="alpha"),
            Column("estimated_draft_forward_ms", "est. draft\nms", 2),
            Column("best.num_draft_tokens", "est. best\nlength", 0),
            Column("best.estimated_tau", "est.\ntau", 2, term="tau"),
            Column("best.estimated_step_ms", "est. step\nms", 2),
            Column("best.estimated_speedup", "est. vs\nplain", 2, term="estimate"),
            Column("best.estimated_tokens_per_s", "est. tokens/s\na row", 1, term="estimate"),
        ],
        rows=estimate.drafters,
    )


@dataclass(frozen=True)
class Match:
    """A configuration of a plan, and the arm of a bench that is the same.

    Attributes:
        run: label of the bench.
        name: name of the arm, marked where the plan chose it.
        steps: where the plan's step times come from.
        error: predicted over measured speedup, minus 1.
    """

    run: str | None
    planned: Configuration
    arm: BenchArm
    name: str
    steps: str
    error: float


def match_plan(
    plan: Plan, arms: Sequence[BenchArm], batch_size: int, run: str | None = None
) -> list[Match]:
    """Find arms with the type, options and batch size of a planned configuration.

    Options that were left out count as their defaults. An arm whose draft length changes while it
    runs is no configuration of a plan.
    """
    by_key: dict[str, BenchArm] = {}
    for arm in arms:
        if arm.type and arm.speedup_vs_plain and not arm.draft_length:
            by_key.setdefault(same_key(arm.type, arm.options), arm)
    found = []
    for each in plan.configurations:
        same = by_key.get(same_key(each.type, each.options))
        if same is not None and same.speedup_vs_plain and each.batch_size == batch_size:
            name = same.name + (" *" if each.name == plan.choice.name else "")
            error = each.predicted_speedup / same.speedup_vs_plain - 1
            found.append(Match(run, each, same, name, timed_or_fitted(each), error))
    return found


def planned_table(plan: Plan, results: BenchResults) -> Table:
    """Show what a plan predicted for the arms of a bench, its choice marked."""
    matches = match_plan(plan, results.arms, results.provenance.config.batch_size)
    return _match_table(matches, f"The plan chose: {plan.choice.name}", not_trusted(plan))


def _match_table(matches: Sequence[Match], caption: str, legend: Sequence[str] = ()) -> Table:
    return Table(
        id="predictions",
        caption=caption,
        columns=[
            Column("name", "arm"),
            Column("run", "measured in", is_optional=True, is_wide=True),
            Column("planned.batch_size", "batch", 0, is_wide=True),
            Column("planned.predicted_tau", "tau\npredicted", 2, term="tau", rank=1),
            Column("arm.tau", "tau\nmeasured", 2),
            _STEPS_ARE,
            Column("planned.predicted_speedup", "vs plain\npredicted", 2, term="speedup", rank=2),
            Column("arm.speedup_vs_plain", "vs plain\nmeasured", 2, rank=2),
            Column("error", "error", 1, " %", scale=100),
        ],
        rows=list(matches),
        legend=["*: the plan's choice", *legend],
    )


def add_plan(section: Section, run: Run) -> None:
    """Show the choice, the schedule, and how well the fits hold."""
    for build in (plan_table, schedule_table, costs_table):
        section.show(build(run.data, f"{run.label}: "))


def add_estimate(section: Section, run: Run) -> None:
    """Show the best length of every draft model, what it assumes, and speed by length."""
    section.text += [f"{run.label}, {run.data.label}. It assumes:", *run.data.assumptions]
    section.show(estimate_table(run.data, f"{run.label}: "))
    smallest = min(drafter.batch_size for drafter in run.data.drafters)
    shown = [drafter for drafter in run.data.drafters if drafter.batch_size == smallest]
    said = "; ".join(
        f"{each.name} {each.best.estimated_speedup:.2f}x at {each.best.num_draft_tokens}"
        for each in shown
    )
    section.draw(
        "estimate",
        f"{run.label}: estimated speed over plain decoding by draft length, batch {smallest}; "
        "nothing was measured.",
        f"Lines of estimated speed against draft length. Best: {said}.",
        estimated_speed(shown),
    )


def add_predictions(section: Section, runs: Sequence[Run]) -> None:
    """Set every configuration of a plan beside the bench that measured it."""
    plans, benches = ([run for run in runs if run.kind == kind] for kind in ("plan", "bench"))
    benches += [cell for run in runs if run.kind == "sweep" for cell in read_cells(run)]
    if not plans or not benches:
        section.missing.append("It needs a plan and a bench of the same machine among the runs.")
        return
    matches: list[Match] = []
    for plan in plans:
        for bench in benches:
            differ = find_differences(plan, bench, PLAN_FIELDS)
            if differ:
                section.missing.append(
                    f"{bench.label} is not matched with the plan {plan.label}: {differ[0].key} is "
                    f"{str(differ[0].other)!r}, not {str(differ[0].first)!r}."
                )
            else:
                size = bench.config["batch_size"]
                matches += match_plan(plan.data, bench.data.arms, size, bench.label)
    if not matches:
        section.missing.append(
            "No configuration of a plan was measured: none has an arm of the same type, options "
            "and batch size."
        )
        return
    summary = summarize(matches)
    section.text.append(summary)
    section.draw(
        "prediction",
        "Each point is one configuration, with 95 % intervals; on the diagonal the plan was right.",
        f"Scatter plot of predicted against measured speed. {summary}",
        predicted_against_measured(matches),
    )
    section.show(_match_table(matches, "Predicted and measured"))


def summarize(matches: Sequence[Match]) -> str:
    """Give the median error, and Spearman's rank correlation of three or more."""
    error = median(abs(each.error) for each in matches)
    rank = "not defined"
    if len(matches) > 2:
        from scipy.stats import spearmanr

        pairs = [(each.planned.predicted_speedup, each.arm.speedup_vs_plain) for each in matches]
        found = spearmanr(*zip(*pairs, strict=True)).statistic
        rank = rank if found != found else f"{found:.3f}"
    return (
        f"{len(matches)} configurations: median error {100 * error:.1f} %, rank correlation "
        f"(Spearman) {rank}."
    )


def add_shapes(section: Section, runs: Sequence[Run]) -> None:
    """Draw trees as heat maps and chains as lines, measured and predicted."""
    for run in runs:
        if run.kind == "bench":
            _draw(section, find_points(run.data.arms, "speedup_vs_plain"), run.label, "measured")
        elif run.kind == "sweep":
            for cell in run.data.cells:
                found = find_points(cell.arms, "speedup_vs_plain")
                _draw(section, found, f"{run.label}: {cell.name}", "measured")
        elif run.kind == "plan":
            configurations = run.data.configurations
            for size in sorted({each.batch_size for each in configurations}):
                here = [each for each in configurations if each.batch_size == size]
                found = find_points(here, "predicted_speedup")
                _draw(section, found, f"{run.label}, batch {size}", "predicted")
    if not section.figures:
        section.missing.append(
            "No strategy in two shapes: give a sweep over its options, or the folder of specdec "
            "plan."
        )


def _draw(section: Section, found: Sequence[Point], label: str, origin: str) -> None:
    for members in group_points(point for point in found if not point.is_chain):
        if is_map(members):
            best = max(members, key=lambda point: point.speedup)
            other = {"nodes": "node budget", "width": "width"}[vertical(members)]
            group = members[0].group
            section.draw(
                "shape",
                f"{label}: {origin} speed over plain decoding of {group}, trees by depth and "
                f"{other}; the fastest is framed. Shapes that share a cell show the faster one.",
                f"Heat map of {len(members)} trees of {group}. The fastest, {best.name}, reaches "
                f"{best.speedup:.2f}x with depth {best.depth}, width {best.width} and "
                f"{best.nodes} nodes.",
                tree_heat_map(members),
            )
    chains = group_points(point for point in found if point.is_chain)
    if chains:
        fastest = [max(members, key=lambda point: point.speedup) for members in chains]
        said = "; ".join(f"{b.group} best at {b.length}: {b.speedup:.2f}x" for b in fastest)
        section.draw(
            "shape",
            f"{label}: {origin} speed over plain decoding by the length of a chain, or by the "
            "node budget of a strategy that has no depth.",
            f"Lines of speed against draft length. {said}.",
            chain_lines(chains),
        )
