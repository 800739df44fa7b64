"""Plans and estimates: choice, schedule, draft shapes, and predictions beside measurements."""

import inspect
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, product
from statistics import median
from typing import Any, NamedTuple

from specdec.bench.results import BenchArm, BenchResults
from specdec.planning.results import Configuration, Plan
from specdec.planning.roofline import Estimate
from specdec.registry import DRAFTERS, strategy
from specdec.report import figures
from specdec.report.compare import PLAN_FIELDS, find_differences
from specdec.report.document import AbsentError, Section
from specdec.report.runs import Run, read_cells
from specdec.report.tables import Table


def plan_table(plan: Plan, label: str = "") -> Table:
    rows = [
        {"place": str(place) if place > 1 else "choice", "steps": _steps(each), **vars(each)}
        for place, each in enumerate([plan.choice, *plan.runners_up], start=1)
    ]
    caption = (
        f"{label}plan for batch size {plan.choice.batch_size}: predictions from measured costs and "
        f"the acceptance of {plan.workload.tokens} tokens"
    )
    return Table("choice", caption, rows, legend=[*plan.provenance.notes, *not_trusted(plan)])


def _steps(predicted: Any) -> str:
    return "timed" if predicted.is_timed else "fitted"


def not_trusted(plan: Plan) -> list[str]:
    """Warn of a plan whose times a busy machine made."""
    if plan.trust is None or plan.trust.is_trusted:
        return []
    return [
        f"its times are not to be trusted: {'; '.join(plan.trust.reasons)}; plan again, in a new "
        "folder, with nothing else running"
    ]


def schedule_table(plan: Plan, label: str = "") -> Table:
    best = {(each.batch_size, each.nodes): each for each in plan.schedule_predictions}
    rows = []
    for size, nodes in sorted(plan.schedule.items()):
        row = {"batch": f"from {size}", "nodes": nodes, "gain": 1.0, "steps": "timed"}
        if found := best.get((size, nodes)):
            row |= {"gain": found.predicted_speedup, "steps": _steps(found)}
        rows.append(row)
    caption = f"{label}nodes to draft by batch size (0: plain decoding), {plan.controller.drafter}"
    return Table("schedule", caption, rows)


def costs_table(plan: Plan, label: str = "") -> Table:
    """Show what the fits leave over."""
    chains = [point.batch_size for point in plan.costs.points if not point.is_tree]
    rows: list[tuple[Any, ...]] = [
        ("target forward", size, chains.count(size), fit.chain.residuals)
        for size, fit in plan.costs.forward.items()
    ]
    for each in plan.costs.drafters:
        what = f"step with {each.drafter}"
        rows.append((what, each.batch_size, len(each.points), each.residuals))
    named = [dict(zip(("what", "batch", "points", "errors"), row, strict=True)) for row in rows]
    caption = f"{label}fits of measured times; errors are relative to the measured time"
    return Table("costs", caption, named)


def estimate_table(estimate: Estimate, label: str = "") -> Table:
    caption = f"{label}ESTIMATE from stated parameters: nothing here was measured"
    return Table("estimate", caption, estimate.drafters)


def add_plan(section: Section, run: Run) -> None:
    for build in (plan_table, schedule_table, costs_table):
        section.show(build(run.data, f"{run.label}: "))


def add_estimate(section: Section, run: Run) -> None:
    section.text += [f"{run.label}, {run.data.label}. It assumes:", *run.data.assumptions]
    section.show(estimate_table(run.data, f"{run.label}: "))
    smallest = min(drafter.batch_size for drafter in run.data.drafters)
    shown = [drafter for drafter in run.data.drafters if drafter.batch_size == smallest]
    lines = {
        each.name: [(x.num_draft_tokens, x.estimated_speedup) for x in each.lengths]
        for each in shown
    }
    labels = "drafted tokens a step", "speed / plain decoding, ESTIMATED"
    png = figures.speed_by_length(lines, *labels)
    section.draw("estimate", png, shown, label=run.label, batch=smallest)


# --- Predictions beside measurements ---


class Match(NamedTuple):
    """A configuration of a plan, and the arm of a bench, with the label `run`, that is the same."""

    run: str | None
    planned: Configuration
    arm: BenchArm
    name: str  # of the arm, marked where the plan chose it
    steps: str
    error: float  # predicted over measured speedup, minus 1


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
            by_key.setdefault(_same_key(arm), arm)
    found = []
    for each in plan.configurations:
        same = by_key.get(_same_key(each))
        if same is not None and same.speedup_vs_plain and each.batch_size == batch_size:
            name = same.name + " *" * (each.name == plan.choice.name)
            error = each.predicted_speedup / same.speedup_vs_plain - 1
            found.append(Match(run, each, same, name, _steps(each), error))
    return found


def _same_key(arm: Any) -> str:
    return json.dumps([arm.type, _filled(arm.type, arm.options)], sort_keys=True, default=str)


def _filled(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give all options of a registered strategy; of another one what was given."""
    found = dict(options)
    if kind in DRAFTERS:
        drafter = strategy(kind)
        parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty} | found
    if found.get("drafters"):
        inner = [{"type": x} if isinstance(x, str) else x for x in found["drafters"]]
        found["drafters"] = [_filled(each["type"], each) for each in inner]
    return found


def planned_table(plan: Plan, results: BenchResults) -> Table:
    """Show what a plan predicted for the arms of a bench, its choice marked."""
    matches = match_plan(plan, results.arms, results.provenance.config.batch_size)
    caption = f"The plan chose: {plan.choice.name}"
    return Table("predictions", caption, matches, legend=not_trusted(plan))


def add_predictions(section: Section, runs: Sequence[Run]) -> None:
    """Set every configuration of a plan beside the bench that measured it."""
    plans, benches = ([run for run in runs if run.kind == kind] for kind in ("plan", "bench"))
    benches += [cell for run in runs if run.kind == "sweep" for cell in read_cells(run)]
    if not plans or not benches:
        raise AbsentError("It needs a plan and a bench of the same machine among the runs.")
    matches: list[Match] = []
    for plan, bench in product(plans, benches):
        if differ := find_differences(plan, bench, PLAN_FIELDS):
            section.missing.append(
                f"{bench.label} is not matched with the plan {plan.label}: {differ[0].key} is "
                f"{str(differ[0].other)!r}, not {str(differ[0].first)!r}."
            )
        else:
            size = bench.config["batch_size"]
            matches += match_plan(plan.data, bench.data.arms, size, bench.label)
    if not matches:
        raise AbsentError(
            "No configuration of a plan was measured: none has an arm of the same type, options "
            "and batch size."
        )
    summary = summarize(matches)
    section.text.append(summary)
    section.draw("prediction", figures.predicted_against_measured(matches), [summary])
    section.show(Table("predictions", "Predicted and measured", matches))


def summarize(matches: Sequence[Match]) -> str:
    """Give the median error, and Spearman's rank correlation of three or more."""
    error, rank = median(abs(each.error) for each in matches), float("nan")
    if len(matches) > 2:
        from scipy.stats import spearmanr

        pairs = [(each.planned.predicted_speedup, each.arm.speedup_vs_plain) for each in matches]
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
    said = "not defined" if rank != rank else f"{rank:.3f}"
    return (
        f"{len(matches)} configurations: median error {100 * error:.1f} %, rank correlation "
        f"(Spearman) {said}."
    )


# --- Draft shapes, read from the options of arms and of planned configurations ---


class Point(NamedTuple):
    """One shape and the speedup over plain decoding that it has."""

    depth: int | None  # None where the strategy has only a budget of nodes
    width: int  # nodes expanded a level; 1 is a chain
    nodes: int | None
    speedup: float
    name: str

    @property
    def length(self) -> int | None:
        """Length of a chain, or the budget of nodes where that alone tells it; None for trees."""
        return self.nodes if self.depth is None else self.depth if self.width == 1 else None


def find_shapes(arms: Iterable[Any], key: str) -> tuple[dict[str, list[Point]], ...]:
    """Find arms that differ in shape alone: trees, and chains, by strategy and other options.

    The speedup is their field `key`.
    """
    trees: dict[str, list[Point]] = defaultdict(list)
    chains: dict[str, list[Point]] = defaultdict(list)
    for arm in arms:
        # Fixed choices are a shape that no number tells.
        is_fixed = getattr(arm, "draft_length", None) or arm.options.get("choices") is not None
        if not getattr(arm, key) or arm.type not in DRAFTERS or is_fixed:
            continue
        names = strategy(arm.type).shape_options.names
        options = _filled(arm.type, arm.options)
        depth, width, nodes = (
            options.get(names.get(part, "")) for part in ("depth", "width", "nodes")
        )
        if (depth, nodes) != (None, None):
            shape = {name for part, name in names.items() if part != "threshold"}
            others = {name: value for name, value in arm.options.items() if name not in shape}
            point = Point(depth, width or 1, nodes, getattr(arm, key), arm.name)
            groups = trees if point.length is None else chains
            groups[_in_words(arm.type, others)].append(point)
    return tuple(
        {name: points for name, points in groups.items() if len({p[:3] for p in points}) > 1}
        for groups in (trees, chains)
    )


def _in_words(kind: str, options: Mapping[str, Any]) -> str:
    """Name a strategy and its options, drafters inside by their names alone."""
    said = []
    for key, value in options.items():
        if key == "drafters":
            value = " + ".join(each if isinstance(each, str) else each["type"] for each in value)
        said.append(f"{key} {value}")
    return kind + (f" ({', '.join(said)})" if said else "")


def axis_of(trees: Sequence[Point]) -> str | None:
    """Name what varies besides the depth; None where less than half of the grid was tried."""
    axis = "nodes" if len({point.nodes for point in trees}) > 1 else "width"
    cells = {(point.depth, getattr(point, axis)) for point in trees}
    columns, rows = (len(set(values)) for values in zip(*cells, strict=True))
    return axis if 2 * len(cells) > columns * rows else None


def add_shapes(section: Section, runs: Sequence[Run]) -> None:
    for run in runs:
        if run.kind == "bench":
            _draw(section, run.data.arms, run.label)
        elif run.kind == "sweep":
            for cell in run.data.cells:
                _draw(section, cell.arms, f"{run.label}: {cell.name}")
        elif run.kind == "plan":
            by_size = sorted(run.data.configurations, key=lambda each: each.batch_size)
            for size, here in groupby(by_size, key=lambda each: each.batch_size):
                _draw(section, here, f"{run.label}, batch {size}", "predicted")
    if not section.figures:
        raise AbsentError(
            "No strategy in two shapes: give a sweep over its options, or the folder of specdec "
            "plan."
        )


def _draw(section: Section, arms: Iterable[Any], label: str, origin: str = "measured") -> None:
    key = "speedup_vs_plain" if origin == "measured" else "predicted_speedup"
    trees, chains = find_shapes(arms, key)
    where = {"label": label, "origin": origin}
    for group, points in trees.items():
        if axis := axis_of(points):
            best = max(points, key=lambda point: point.speedup)
            where |= {"axis": {"nodes": "node budget"}.get(axis, axis), "group": group}
            png = figures.tree_heat_map(group, points, axis)
            section.draw("trees", png, (), "shape", **where, num=len(points), best=best)
    if chains:
        lines = {name: [(p.length, p.speedup) for p in points] for name, points in chains.items()}
        best_of = {name: max(line, key=lambda point: point[1]) for name, line in lines.items()}
        png = figures.speed_by_length(lines)
        section.draw("chains", png, best_of.items(), "shape", **where)
