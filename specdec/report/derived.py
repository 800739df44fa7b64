"""Where the time of an arm went, and where its speedup went."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

from specdec.registry import DRAFTERS, strategy
from specdec.report.comparable import find_differences
from specdec.report.runs import Run, same_key, with_defaults

# In the order of the picture. "other" is the rest of the loop.
PARTS = ("target", "draft", "verify", "commit", "other")
PART_NAMES = {
    "target": "target forward",
    "draft": "drafting",
    "verify": "verify",
    "commit": "commit",
    "other": "rest of the loop",
}
# Of the waterfall, behind tau. Plain decoding drafts nothing, so that all drafting is loss.
LOSSES = {
    "target": "wider target forward",
    "draft": "drafting",
    "verify": "verify",
    "commit": "commit",
    "other": "rest of the loop",
}
OUTSIDE = "outside of steps"


@dataclass(frozen=True)
class Breakdown:
    """An arm's decoding time.

    Attributes:
        name: of the arm.
        tau: tokens a step.
        step_ms: milliseconds of a step by part, a batch's time shared by its rows.
    """

    name: str
    tau: float
    step_ms: dict[str, float]

    @property
    def token_ms(self) -> dict[str, float]:
        """Milliseconds of an emitted token by part."""
        return {part: value / self.tau for part, value in self.step_ms.items()}


@dataclass(frozen=True)
class Waterfall:
    """From tau down to the measured speedup.

    Attributes:
        name: of the arm.
        tau: the speedup, if a step cost what a step of plain decoding costs and nothing else.
        factors: (name, factor), in order; tau times all of them is `measured`.
        measured: the speedup over plain decoding.
    """

    name: str
    tau: float
    factors: list[tuple[str, float]]
    measured: float

    @property
    def product(self) -> float:
        """Tau times all factors."""
        return self.tau * prod(factor for _, factor in self.factors)


def breakdown(arm: dict[str, Any], repeats: int) -> Breakdown | None:
    """Of an arm of `results.json`; None where the steps were not timed, as in transformers' arms.

    Args:
        arm: version 1 or 2. Version 1 knows neither verify nor commit: they are in "other".
        repeats: of the bench.
    """
    steps = num_steps(arm, repeats)
    if not steps or not arm["tau"] or not arm["time_s"]["wall"]:
        return None
    times = {part: arm["time_s"][part] for part in PARTS if part in arm["time_s"]}
    return Breakdown(arm["name"], arm["tau"], {p: 1000 * s / steps for p, s in times.items()})


def num_steps(arm: dict[str, Any], repeats: int) -> float | None:
    """Verify steps of all repeats; in version 1, from T - 1 = tau S of each prompt."""
    if "per_prompt" in arm:
        return sum(each["steps"] for each in arm["per_prompt"] if each is not None)
    if not arm["tau"]:
        return None
    return repeats * (arm["tokens"] - arm["prompts"] + arm["failed"]) / arm["tau"]


def waterfall(arm: dict[str, Any], ours: Breakdown, plain: Breakdown) -> Waterfall | None:
    """Split an arm's speedup into factors; None where it has no speedup.

    Each part is added to the cost of a plain step in turn, and its factor is the cost before over
    the cost after. The last one holds what is outside of steps: the time between them, in a batch
    the wait for other rows, and that a prompt counts by the median of its repeats.
    """
    measured = arm["speedup_vs_plain"]
    if measured is None:
        return None
    cost = sum(plain.step_ms.values())
    factors = []
    for part in PARTS:
        if part in ours.step_ms:
            more = cost + ours.step_ms[part] - plain.step_ms.get(part, 0.0)
            factors.append((LOSSES[part], cost / more))
            cost = more
    so_far = ours.tau * prod(factor for _, factor in factors)
    factors.append((OUTSIDE, measured / so_far))
    return Waterfall(arm["name"], ours.tau, factors, measured)


# A prediction is of one target on one machine; prompts and lengths may differ.
MUST_AGREE = ("target", "sampling", "rule", "dtype", "device", "threads")


@dataclass(frozen=True)
class Match:
    """One configuration of a plan, and an arm that is the same.

    Attributes:
        plan, run: their labels.
        configuration: of the plan.
        arm: of the bench.
    """

    plan: str
    run: str
    configuration: dict[str, Any]
    arm: dict[str, Any]

    @property
    def predicted(self) -> float:
        """Speedup over plain decoding that the plan promises."""
        return float(self.configuration["predicted_speedup"])

    @property
    def measured(self) -> float:
        """Speedup over plain decoding that was measured."""
        return float(self.arm["speedup_vs_plain"])

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.measured - 1


def match(plan: Run, bench: Run) -> list[Match]:
    """Arms that are a configuration of the plan: same type, options and batch size.

    Options that were left out count as their defaults. An arm whose draft length changes while it
    runs is no configuration of a plan.
    """
    batch_size = bench.config.get("batch_size")
    arms: dict[str, dict[str, Any]] = {}
    for arm in bench.arms:
        if "type" in arm and not arm.get("draft_length") and arm["speedup_vs_plain"]:
            arms.setdefault(same_key(arm["type"], arm["options"]), arm)
    found = []
    for each in plan.data["configurations"]:
        same = arms.get(same_key(each["type"], each["options"]))
        if same is not None and each["batch_size"] == batch_size:
            found.append(Match(plan.label, bench.label, each, same))
    return found


def match_all(plans: Sequence[Run], benches: Sequence[Run]) -> tuple[list[Match], list[str]]:
    """All matches, and in words why runs were not matched."""
    found, why = [], []
    for plan in plans:
        for bench in benches:
            differ = find_differences(plan, bench, MUST_AGREE)
            if differ:
                each = differ[0]
                why.append(
                    f"{bench.label} is not matched with the plan {plan.label}: {each.key} is "
                    f"{each.values[1]!r}, not {each.values[0]!r}."
                )
            else:
                found += match(plan, bench)
    return found, why


def median_error(matches: Sequence[Match]) -> float:
    """Median of |predicted / measured - 1|."""
    return median(abs(each.error) for each in matches)


def rank_correlation(matches: Sequence[Match]) -> float | None:
    """Spearman's rho of predicted and measured speedups; None for fewer than three."""
    if len(matches) < 3:
        return None
    from scipy.stats import spearmanr

    found = spearmanr([m.predicted for m in matches], [m.measured for m in matches]).statistic
    return float(found) if found == found else None


@dataclass(frozen=True)
class Point:
    """One shape and the speedup over plain decoding that it has.

    Attributes:
        group: strategy with the options that are not its shape; points of a group are comparable.
        label: the group in words.
        depth: levels of the draft; None where the strategy has only a budget of nodes.
        width: nodes expanded a level; 1 is a chain.
        nodes: budget of drafted nodes.
        speedup: over plain decoding.
        name: of the arm.
    """

    group: str
    label: str
    depth: int | None
    width: int
    nodes: int | None
    speedup: float
    name: str

    @property
    def is_chain(self) -> bool:
        """Whether it is told by one number: a length, or a budget alone."""
        return self.width == 1 or self.depth is None

    @property
    def length(self) -> int | None:
        """That number."""
        return self.nodes if self.depth is None else self.depth


def points(arms: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """Every arm whose strategy has a shape.

    Args:
        arms: of results, or configurations of a plan.
        key: "speedup_vs_plain" or "predicted_speedup".
    """
    found = [_point(arm, arm[key]) for arm in arms if arm.get(key) and arm.get("type")]
    return [point for point in found if point is not None]


def by_group(found: Iterable[Point]) -> dict[str, list[Point]]:
    """Points of each group that has at least two shapes."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        groups.setdefault(point.group, []).append(point)
    return {
        name: members
        for name, members in groups.items()
        if len({(p.depth, p.width, p.nodes) for p in members}) > 1
    }


def is_map(members: Sequence[Point]) -> bool:
    """Whether more than half of the grid of depths and nodes (or widths) was tried."""
    part = vertical(members)
    cells = {(point.depth, getattr(point, part)) for point in members}
    columns, rows = (len(set(values)) for values in zip(*cells, strict=True))
    return 2 * len(cells) > columns * rows


def vertical(members: Sequence[Point]) -> str:
    """What varies besides the depth: "nodes", or "width" where the nodes are all the same."""
    return "nodes" if len({point.nodes for point in members}) > 1 else "width"


def _point(arm: Mapping[str, Any], speedup: float) -> Point | None:
    kind, given = arm["type"], arm["options"]
    names = strategy(kind).shape_options.names if kind in DRAFTERS else {}
    options = with_defaults(kind, given)
    depth, width, nodes = (options.get(names.get(part, "")) for part in ("depth", "width", "nodes"))
    if arm.get("draft_length") or (depth is None and nodes is None):
        return None
    if given.get("choices") is not None:
        return None  # a shape of its own, which no number tells
    shape_options = {name for part, name in names.items() if part != "threshold"}
    others = {key: value for key, value in given.items() if key not in shape_options}
    group = json.dumps([kind, others], sort_keys=True)
    return Point(group, _label(kind, others), depth, width or 1, nodes, speedup, arm["name"])


def _label(kind: str, others: Mapping[str, Any]) -> str:
    """The strategy and its other options, drafters inside by their names alone."""
    said = []
    for key, value in others.items():
        if key == "drafters":
            value = " + ".join(each if isinstance(each, str) else each["type"] for each in value)
        said.append(f"{key} {value}")
    return kind + (f" ({', '.join(said)})" if said else "")
