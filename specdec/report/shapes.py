"""Draft shapes, read from the options of arms and of planned configurations."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.registry import DRAFTERS, strategy


@dataclass(frozen=True)
class Point:
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
    def is_chain(self) -> bool:
        """True if one number tells it: a length, or a budget alone."""
        return self.width == 1 or self.depth is None

    @property
    def length(self) -> int:
        """Length of the chain, or its budget of nodes."""
        return (self.nodes if self.depth is None else self.depth) or 0


def find_points(arms: Iterable[Any], key: str) -> list[Point]:
    """Find every arm, or configuration of a plan, whose strategy has a shape."""
    found = [_point(arm, getattr(arm, key)) for arm in arms if getattr(arm, key)]
    return [point for point in found if point is not None]


def _point(arm: Any, speedup: float) -> Point | None:
    if arm.type not in DRAFTERS or getattr(arm, "draft_length", None):
        return None
    shape = strategy(arm.type).shape_options
    options = with_defaults(arm.type, arm.options)
    parts = ("depth", "width", "nodes")
    depth, width, nodes = (options.get(shape.names.get(part, "")) for part in parts)
    if (depth is None and nodes is None) or arm.options.get("choices") is not None:
        return None  # fixed choices are a shape that no number tells
    shape_options = {name for part, name in shape.names.items() if part != "threshold"}
    others = {key: value for key, value in arm.options.items() if key not in shape_options}
    return Point(_in_words(arm.type, others), depth, width or 1, nodes, speedup, arm.name)


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
    return [
        members
        for members in groups.values()
        if len({(point.depth, point.width, point.nodes) for point in members}) > 1
    ]


def vertical(members: Sequence[Point]) -> str:
    """Name what varies besides the depth: "nodes", or "width" where all nodes are the same."""
    return "nodes" if len({point.nodes for point in members}) > 1 else "width"


def is_map(members: Sequence[Point]) -> bool:
    """Tell if more than half of the grid of depths and nodes (or widths) was tried."""
    cells = {(point.depth, getattr(point, vertical(members))) for point in members}
    columns, rows = (len(set(values)) for values in zip(*cells, strict=True))
    return 2 * len(cells) > columns * rows


def with_defaults(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give all options of a registered strategy; of another one what was given."""
    found = {**_defaults(kind), **options}
    given = found.get("drafters") or ()
    inner = [{"type": each} if isinstance(each, str) else each for each in given]
    if inner:
        found["drafters"] = [{**with_defaults(each["type"], each)} for each in inner]
    return found


def same_key(kind: str, options: Mapping[str, Any]) -> str:
    """Make a text that two arms share when they are the same strategy."""
    return json.dumps([kind, with_defaults(kind, options)], sort_keys=True, default=str)


def _defaults(kind: str) -> dict[str, Any]:
    if kind not in DRAFTERS:
        return {}
    drafter = strategy(kind)
    parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
