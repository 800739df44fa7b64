"""Draft shapes and their speed, taken from arms that were measured or planned."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.planning.shape import rule_of
from specdec.report.options import with_defaults


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
    names = rule_of(kind).names
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
