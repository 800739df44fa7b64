"""The configurations that are compared: those given, and the other shapes of their drafters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig
from specdec.engine.interfaces import Drafter
from specdec.registry import load_drafter


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


CHAIN_DEPTHS = range(1, 13)
TREE_DEPTHS, TREE_WIDTHS = (2, 3, 4, 6, 8), (2, 3)
TREE_NODES = (4, 6, 8, 12, 16, 24)
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
THRESHOLD_DEPTHS, THRESHOLDS = (6, 12), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
# A drafter of which one shape is timed alone has as many decodings as others have shapes.
TIMES_GIVEN = 3
# What is timed; the fit says the rest.
TIMED_CHAINS = (1, 2, 4, 8, 12)
TIMED_TREES = ((2, 2, 4), (4, 2, 8), (4, 4, 12), (8, 2, 12), (6, 3, 16), (8, 4, 24))
TIMED_NODES = (1, 3, 6, 12, 20, 32)


class Family:
    """One drafter of the configuration: its arms, and the shapes it can take.

    Args:
        name: of the drafter.
        kind: its type.
        base: its options without the shape.
    """

    def __init__(self, name: str, kind: str, base: Mapping[str, Any]) -> None:
        self.name, self.kind, self.base = name, kind, dict(base)
        self.rule = rule_of(kind)
        self.given: list[Candidate] = []

    def candidate(self, shape: Shape) -> Candidate:
        """This drafter in a shape, named after it."""
        return Candidate(
            f"{self.name} {label(self.rule.names, shape)}",
            self.kind,
            to_options(self.kind, self.base, shape),
            self.name,
            shape,
        )

    @property
    def is_searched(self) -> bool:
        """Whether other shapes than the given are tried."""
        return is_searched(self.kind, self.base)

    def searched(self) -> list[Candidate]:
        """The given configurations first, then every other shape."""
        # By shape and not by options: an arm may leave out what is the default.
        given = {c.shape for c in self.given}
        found = [self.candidate(shape) for shape in self._shapes()] if self.is_searched else []
        return [*self.given, *(c for c in found if c.shape not in given)]

    def _shapes(self) -> Iterator[Shape]:
        kinds = self.rule.searched
        if "chain" in kinds:
            yield from (chain(depth) for depth in CHAIN_DEPTHS)
        if "tree" in kinds:
            yield from _trees()
        if "nodes" in kinds:
            is_tree = self.given[0].shape.is_tree
            yield from (budget(nodes, is_tree and nodes > 1) for nodes in NODES)
        if "threshold" in kinds:
            for depth in THRESHOLD_DEPTHS:
                yield from (Shape(depth, 1, depth, False, t) for t in THRESHOLDS)

    def timed(self) -> list[Candidate]:
        """The shapes whose steps are timed, from which the others follow."""
        if not self.is_searched:
            return self.given * TIMES_GIVEN
        kinds = self.rule.searched
        shapes: list[Shape] = []
        if "chain" in kinds:
            shapes += [chain(depth) for depth in TIMED_CHAINS]
        if "tree" in kinds:
            shapes += [Shape(d, w, n, True) for d, w, n in TIMED_TREES]
        if "nodes" in kinds:
            is_tree = self.given[0].shape.is_tree
            shapes += [budget(nodes, is_tree and nodes > 1) for nodes in TIMED_NODES]
        # A fit is not believed beyond what was timed: the largest given shapes are timed as well.
        for shape in sorted((c.shape for c in self.given), key=_size, reverse=True):
            plain = replace(shape, threshold=0.0)
            if not any(timed.covers(plain) for timed in shapes):
                shapes.append(plain)
        return [self.candidate(shape) for shape in shapes]


def _size(shape: Shape) -> tuple[int, int, int]:
    return shape.nodes, shape.depth, shape.width


def chain(depth: int) -> Shape:
    """A chain of `depth` tokens."""
    return Shape(depth, 1, depth, False)


def budget(nodes: int, is_tree: bool) -> Shape:
    """A draft of which only the number of nodes is chosen."""
    return Shape(0, 1, nodes, is_tree)


def _trees() -> Iterator[Shape]:
    for depth in TREE_DEPTHS:
        for width in TREE_WIDTHS:
            # What can be drafted at all: the first level's children and each beam's after it.
            most = width + (depth - 1) * width * width
            for nodes in TREE_NODES:
                if depth < nodes <= most:
                    yield Shape(depth, width, nodes, True)


def label(names: Mapping[str, str], shape: Shape) -> str:
    """A shape in words, as in "chain 5" or "tree 5x2 of 7"."""
    if "depth" not in names:
        return f"{shape.nodes} nodes"
    if shape.is_tree:
        return f"tree {shape.depth}x{shape.width} of {shape.nodes}"
    ending = f" above {shape.threshold:g}" if shape.threshold else ""
    return f"chain {shape.depth}{ending}"


def families(arms: Sequence[ArmConfig], target: Any) -> list[Family]:
    """The drafters of a configuration; arms that differ in their shape alone are one.

    Args:
        arms: of the bench; those of transformers are passed over.
        target: an `HFTarget`.

    Raises:
        ValueError: no arm with a drafter, or one whose options do not hold.
    """
    found: dict[str, Family] = {}
    for arm in arms:
        if arm.type in SINGLE_PROMPT_TYPES:
            continue
        base = base_options(arm.type, arm.options)
        key = _key({"type": arm.type, **base})
        if key not in found:
            taken = {family.name for family in found.values()}
            found[key] = Family(_unused_name(arm, taken), arm.type, base)
        family = found[key]
        drafter = load_drafter({"type": arm.type, **arm.options}, target)
        shape = shape_of(arm.type, arm.options, drafter)
        family.given.append(
            Candidate(arm.name, arm.type, dict(arm.options), family.name, shape, True)
        )
    if not found:
        raise ValueError(
            "config arms holds no drafter to plan with; add at least one, for instance "
            "{type: ngram}"
        )
    return list(found.values())


def _unused_name(arm: ArmConfig, taken: set[str]) -> str:
    """The drafter's type; where another is called so, the arm's name, numbered if it must be."""
    names = [arm.type, arm.name, *(f"{arm.name} {n}" for n in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def shape_of(kind: str, options: Mapping[str, Any], drafter: Drafter) -> Shape:
    """The shape of a drafter that is built."""
    names = rule_of(kind).names
    nodes, is_tree = drafter.max_nodes, drafter.makes_trees
    if "depth" not in names:
        return budget(nodes, is_tree)
    holder: Any = getattr(drafter, "shape", drafter)
    depth = min(getattr(holder, names["depth"]), nodes)
    width = holder.width if is_tree else 1
    threshold = getattr(drafter, names["threshold"]) if "threshold" in names else 0.0
    return Shape(depth, width, nodes, is_tree, threshold)


def _key(options: Mapping[str, Any]) -> str:
    return repr(sorted(options.items()))
