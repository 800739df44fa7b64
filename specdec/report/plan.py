"""Plans and estimates: choice, schedule, draft shapes, and predictions beside measurements."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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
from specdec.report.tables import Column, Table

_STEPS_ARE = Column("steps", "steps\nare")
_PLAN = [
    *(Column("place", ""), Column("name", "configuration")),
    *(Column("type", "type", is_wide=True), Column("options", "options", is_wide=True)),
    Column("predicted_tau", "tau", 2, term="tau", rank=1),
    Column("predicted_speedup", "vs plain", 2, term="speedup", rank=2),
    *(_STEPS_ARE, Column("step_ms.wall", "step\nms", 2)),
    *(Column(f"step_ms.{part}", f"{part}\nms", 2) for part in ("draft", "target", "other")),
]
_SCHEDULE = [
    *(Column("batch", "batch size"), Column("nodes", "nodes", 0)),
    *(Column("gain", "vs plain", 2, term="speedup"), _STEPS_ARE),
]
_COSTS = [
    *(Column("what", "what"), Column("batch", "batch", 0), Column("points", "points", 0)),
    Column("errors.median", "median error", 1, "%", scale=100),
    Column("errors.largest", "largest", 1, "%", scale=100),
]
_ESTIMATE = [
    *(Column("name", "drafter"), Column("batch_size", "batch", 0)),
    Column("alpha", "alpha,\ngiven", term="alpha"),
    Column("estimated_draft_forward_ms", "est. draft\nms", 2),
    Column("best.num_draft_tokens", "est. best\nlength", 0),
    Column("best.estimated_tau", "est.\ntau", 2, term="tau"),
    Column("best.estimated_step_ms", "est. step\nms", 2),
    Column("best.estimated_speedup", "est. vs\nplain", 2, term="estimate"),
    Column("best.estimated_tokens_per_s", "est. tokens/s\na row", 1, term="estimate"),
]
_MATCHES = [
    Column("name", "arm"),
    Column("run", "measured in", is_optional=True, is_wide=True),
    Column("planned.batch_size", "batch", 0, is_wide=True),
    Column("planned.predicted_tau", "tau\npredicted", 2, term="tau", rank=1),
    *(Column("arm.tau", "tau\nmeasured", 2), _STEPS_ARE),
    Column("planned.predicted_speedup", "vs plain\npredicted", 2, term="speedup", rank=2),
    Column("arm.speedup_vs_plain", "vs plain\nmeasured", 2, rank=2),
    Column("error", "error", 1, " %", scale=100),
]


def plan_table(plan: Plan, label: str = "") -> Table:
    """Show the choice and the runners-up."""
    rows = [
        {"place": str(place) if place > 1 else "choice", "steps": _steps(each), **vars(each)}
        for place, each in enumerate([plan.choice, *plan.runners_up], start=1)
    ]
    caption = (
        f"{label}plan for batch size {plan.choice.batch_size}: predictions from measured costs and "
        f"the acceptance of {plan.workload.tokens} tokens"
    )
    legend = [
        "tau: from acceptance; step: milliseconds of draft, target and everything else, timed as "
        "it is or fitted to other shapes"
    ]
    return Table("choice", caption, _PLAN, rows, legend=legend + not_trusted(plan))


def _steps(predicted: Any) -> str:
    """Say where the times of a configuration's steps come from."""
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
    """Show the draft length of every batch size."""
    best = {(each.batch_size, each.nodes): each for each in plan.schedule_predictions}
    rows = []
    for size, nodes in sorted(plan.schedule.items()):
        row = {"batch": f"from {size}", "nodes": nodes, "gain": 1.0, "steps": "timed"}
        if found := best.get((size, nodes)):
            row |= {"gain": found.predicted_speedup, "steps": _steps(found)}
        rows.append(row)
    caption = f"{label}nodes to draft by batch size (0: plain decoding), {plan.controller.drafter}"
    return Table("schedule", caption, _SCHEDULE, rows)


def costs_table(plan: Plan, label: str = "") -> Table:
    """Show what the fits leave over."""
    rows: list[tuple[Any, ...]] = []
    for size, fit in plan.costs.forward.items():
        chains = [p for p in plan.costs.points if p.batch_size == size and not p.is_tree]
        rows.append(("target forward", size, len(chains), fit.chain.residuals))
    for each in plan.costs.drafters:
        what = f"step with {each.drafter}"
        rows.append((what, each.batch_size, len(each.points), each.residuals))
    named = [dict(zip(("what", "batch", "points", "errors"), row, strict=True)) for row in rows]
    caption = f"{label}fits of measured times; errors are relative to the measured time"
    return Table("costs", caption, _COSTS, named)


def estimate_table(estimate: Estimate, label: str = "") -> Table:
    """Show an estimate's drafters at their best draft lengths."""
    caption = f"{label}ESTIMATE from stated parameters: nothing here was measured"
    return Table("estimate", caption, _ESTIMATE, estimate.drafters)


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
    lines = {
        each.name: [(x.num_draft_tokens, x.estimated_speedup) for x in each.lengths]
        for each in shown
    }
    labels = "drafted tokens a step", "speed / plain decoding, ESTIMATED"
    section.draw(
        "estimate",
        f"{run.label}: estimated speed over plain decoding by draft length, batch {smallest}; "
        "nothing was measured.",
        f"Lines of estimated speed against draft length. Best: {said}.",
        figures.speed_by_length(lines, *labels),
    )


# --- Predictions beside measurements ---


@dataclass(frozen=True)
class Match:
    """A configuration of a plan, and the arm of a bench, labeled `run`, that is the same."""

    run: str | None
    planned: Configuration
    arm: BenchArm
    is_choice: bool

    @property
    def name(self) -> str:
        return self.arm.name + " *" * self.is_choice

    @property
    def steps(self) -> str:
        return _steps(self.planned)

    @property
    def error(self) -> float:
        """Predicted over measured speedup, minus 1."""
        return self.planned.predicted_speedup / (self.arm.speedup_vs_plain or 1) - 1


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
    return [
        Match(run, each, by_key[_same_key(each)], each.name == plan.choice.name)
        for each in plan.configurations
        if each.batch_size == batch_size and _same_key(each) in by_key
    ]


def _same_key(arm: Any) -> str:
    """Make a text that two arms share when they are the same strategy."""
    return json.dumps([arm.type, _filled(arm.type, arm.options)], sort_keys=True, default=str)


def _filled(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give all options of a registered strategy; of another one what was given."""
    found = dict(options)
    if kind in DRAFTERS:
        drafter = strategy(kind)
        parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        found = {**defaults, **options}
    if found.get("drafters"):
        inner = [{"type": x} if isinstance(x, str) else x for x in found["drafters"]]
        found["drafters"] = [_filled(each["type"], each) for each in inner]
    return found


def planned_table(plan: Plan, results: BenchResults) -> Table:
    """Show what a plan predicted for the arms of a bench, its choice marked."""
    matches = match_plan(plan, results.arms, results.provenance.config.batch_size)
    return _match_table(matches, f"The plan chose: {plan.choice.name}", not_trusted(plan))


def _match_table(matches: Sequence[Match], caption: str, legend: Sequence[str] = ()) -> Table:
    legend = ["*: the plan's choice", *legend]
    return Table("predictions", caption, _MATCHES, matches, legend=legend)


def add_predictions(section: Section, runs: Sequence[Run]) -> None:
    """Set every configuration of a plan beside the bench that measured it."""
    plans, benches = ([run for run in runs if run.kind == kind] for kind in ("plan", "bench"))
    benches += [cell for run in runs if run.kind == "sweep" for cell in read_cells(run)]
    if not plans or not benches:
        raise AbsentError("It needs a plan and a bench of the same machine among the runs.")
    matches: list[Match] = []
    for plan in plans:
        for bench in benches:
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
    section.draw(
        "prediction",
        "Each point is one configuration, with 95 % intervals; on the diagonal the plan was right.",
        f"Scatter plot of predicted against measured speed. {summary}",
        figures.predicted_against_measured(matches),
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


# --- Draft shapes, read from the options of arms and of planned configurations ---


class Point(NamedTuple):
    """One shape and the speedup over plain decoding that it has.

    Attributes:
        group: strategy with the options that are not its shape, in words; points of a group are
            comparable.
        depth: levels of the draft; None where the strategy has only a budget of nodes.
        width: nodes expanded a level; 1 is a chain.
        nodes: budget of drafted nodes.
        name: name of the arm.
    """

    group: str
    depth: int | None
    width: int
    nodes: int | None
    speedup: float
    name: str

    @property
    def length(self) -> int | None:
        """Length of a chain, or the budget of nodes where that alone tells it; None for trees."""
        return self.nodes if self.depth is None else self.depth if self.width == 1 else None


def find_points(arms: Iterable[Any], key: str) -> list[Point]:
    """Find every arm, or configuration of a plan, whose strategy has a shape."""
    found = []
    for arm in arms:
        speedup = getattr(arm, key)
        if not speedup or arm.type not in DRAFTERS or getattr(arm, "draft_length", None):
            continue
        names = strategy(arm.type).shape_options.names
        options = _filled(arm.type, arm.options)
        depth, width, nodes = (
            options.get(names.get(part, "")) for part in ("depth", "width", "nodes")
        )
        # Fixed choices are a shape that no number tells.
        if (depth, nodes) != (None, None) and arm.options.get("choices") is None:
            shape = {name for part, name in names.items() if part != "threshold"}
            others = {key: value for key, value in arm.options.items() if key not in shape}
            group = _in_words(arm.type, others)
            found.append(Point(group, depth, width or 1, nodes, speedup, arm.name))
    return found


def _in_words(kind: str, options: Mapping[str, Any]) -> str:
    """Name a strategy and its options, drafters inside by their names alone."""
    said = []
    for key, value in options.items():
        if key == "drafters":
            value = " + ".join(each if isinstance(each, str) else each["type"] for each in value)
        said.append(f"{key} {value}")
    return kind + (f" ({', '.join(said)})" if said else "")


def group_points(found: Iterable[Point]) -> list[list[Point]]:
    """Give the points of each group that has at least two shapes."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        groups.setdefault(point.group, []).append(point)
    return [points for points in groups.values() if len({point[1:4] for point in points}) > 1]


def vertical(members: Sequence[Point]) -> str:
    """Name what varies besides the depth: "nodes", or "width" where all nodes are the same."""
    return "nodes" if len({point.nodes for point in members}) > 1 else "width"


def is_map(members: Sequence[Point]) -> bool:
    """Tell if more than half of the grid of depths and nodes (or widths) was tried."""
    cells = {(point.depth, getattr(point, vertical(members))) for point in members}
    columns, rows = (len(set(values)) for values in zip(*cells, strict=True))
    return 2 * len(cells) > columns * rows


def add_shapes(section: Section, runs: Sequence[Run]) -> None:
    """Draw trees as heat maps and chains as lines, measured and predicted."""
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
    found = find_points(arms, "speedup_vs_plain" if origin == "measured" else "predicted_speedup")
    for members in group_points(point for point in found if not point.length):
        if is_map(members):
            best = max(members, key=lambda point: point.speedup)
            part = vertical(members)
            other = {"nodes": "node budget", "width": "width"}[part]
            section.draw(
                "shape",
                f"{label}: {origin} speed over plain decoding of {best.group}, trees by depth and "
                f"{other}; the fastest is framed. Shapes that share a cell show the faster one.",
                f"Heat map of {len(members)} trees of {best.group}. The fastest, {best.name}, "
                f"reaches {best.speedup:.2f}x with depth {best.depth}, width {best.width} and "
                f"{best.nodes} nodes.",
                figures.tree_heat_map(members, part),
            )
    chains = group_points(point for point in found if point.length)
    if chains:
        fastest = [max(members, key=lambda point: point.speedup) for members in chains]
        said = "; ".join(f"{b.group} best at {b.length}: {b.speedup:.2f}x" for b in fastest)
        section.draw(
            "shape",
            f"{label}: {origin} speed over plain decoding by the length of a chain, or by the "
            "node budget of a strategy that has no depth.",
            f"Lines of speed against draft length. {said}.",
            figures.speed_by_length(
                {x[0].group: [(p.length, p.speedup) for p in x] for x in chains}
            ),
        )
