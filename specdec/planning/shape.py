"""What a draft looks like to the clock, and how each strategy's options say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A draft as far as its cost depends on it.

    Attributes:
        depth: levels, at most; 0 where the strategy does not say.
        width: nodes expanded a level; 1 is a chain.
        nodes: drafted nodes, at most.
        is_tree: scored with a tree mask.
        threshold: confidence that ends a chain; 0 is off.
    """

    depth: int
    width: int
    nodes: int
    is_tree: bool
    threshold: float = 0.0

    def covers(self, other: "Shape") -> bool:
        """Whether a draft of the other shape is a part of one of this shape."""
        return (
            self.is_tree == other.is_tree
            and self.depth >= other.depth
            and self.width >= other.width
            and self.nodes >= other.nodes
            and self.threshold <= other.threshold
        )


@dataclass(frozen=True)
class ShapeRule:
    """How a shape becomes options of a strategy.

    Attributes:
        names: the option of each of "depth", "width", "nodes" and "threshold" that there is.
        searched: kinds of shape that are tried: "chain", "tree", "nodes" (a budget alone) and
            "threshold".
        fixed: options that only a search of shapes sets aside: a given one is planned as it is.
        varies: drafts are often shorter than the shape, or empty.
    """

    names: Mapping[str, str]
    searched: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ("choices", "acceptance")
    varies: bool = False


_HEAD = ShapeRule({"depth": "depth", "width": "width", "nodes": "max_nodes"}, ("chain", "tree"))
# A strategy that is not here is planned as configured.
RULES: dict[str, ShapeRule] = {
    "draft_model": ShapeRule(
        {
            "depth": "num_draft_tokens",
            "width": "width",
            "nodes": "max_nodes",
            "threshold": "confidence_threshold",
        },
        ("chain", "tree", "threshold"),
    ),
    "eagle": _HEAD,
    "eagle3": _HEAD,
    "medusa": ShapeRule({"nodes": "max_nodes"}, ("nodes",)),
    "ngram": ShapeRule({"nodes": "num_draft_tokens"}, ("nodes",), ("num_continuations",), True),
    "suffix": ShapeRule({"nodes": "max_nodes"}, ("nodes",), ("width",), True),
    "hybrid": ShapeRule({"nodes": "max_nodes"}, varies=True),
}
UNKNOWN = ShapeRule({}, varies=True)


def rule_of(kind: str) -> ShapeRule:
    """The rule of a strategy; one that is not in the table has no shapes to choose from."""
    return RULES.get(kind, UNKNOWN)


def is_searched(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether other shapes than the given one are tried."""
    rule = rule_of(kind)
    is_sampled = options.get("children", "top") != "top"
    return bool(rule.searched) and not is_sampled and not any(o in options for o in rule.fixed)


def base_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make the drafter itself, its shape taken out."""
    if not is_searched(kind, options):
        return dict(options)
    shape_options = set(rule_of(kind).names.values())
    return {key: value for key, value in options.items() if key not in shape_options}


def to_options(kind: str, base: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The options of a drafter in this shape."""
    names = rule_of(kind).names
    wanted = {"depth": shape.depth}
    if shape.threshold:
        wanted["threshold"] = shape.threshold  # type: ignore[assignment]
    if "width" in names:
        wanted["width"] = shape.width
    if shape.is_tree or "depth" not in names:
        wanted["nodes"] = shape.nodes
    return {**base, **{names[key]: value for key, value in wanted.items() if key in names}}


def cut(
    kind: str, options: Mapping[str, Any], shape: Shape, nodes: int
) -> tuple[dict[str, Any], Shape]:
    """The same drafter with at most `nodes` nodes a step, as options and as a shape.

    Where no option says so, both stay as they are.
    """
    names = rule_of(kind).names
    if nodes >= shape.nodes or not names or any(o in options for o in rule_of(kind).fixed):
        return dict(options), shape
    depth = min(shape.depth, nodes)
    changed = {"depth": depth} if "depth" in names else {}
    if shape.is_tree or "depth" not in names:
        changed["nodes"] = nodes
    cut_options = {**options, **{names[key]: value for key, value in changed.items()}}
    return cut_options, Shape(depth, shape.width, nodes, shape.is_tree, shape.threshold)


@dataclass(frozen=True)
class Candidate:
    """A drafter in a shape: something that a bench arm could be.

    Attributes:
        name: of the arm.
        type: of the drafter.
        options: of the arm.
        drafter: name of the drafter without its shape; candidates that share it share weights.
        shape: what it costs by.
        is_given: an arm of the configuration, not one that a search thought of.
    """

    name: str
    type: str
    options: dict[str, Any]
    drafter: str
    shape: Shape
    is_given: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """The same for the same strategy with the same options."""
        return repr((self.type, sorted(self.options.items())))

    @property
    def varies(self) -> bool:
        """Whether its drafts are often shorter than its shape, or empty."""
        return bool(self.shape.threshold) or rule_of(self.type).varies
