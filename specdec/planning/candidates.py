"""The configurations that are compared: those given, and other shapes of their drafters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig
from specdec.drafters.base import DraftShape, ShapeOptions
from specdec.registry import load_drafter, strategy

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
TIMED_NODES = (1, 3, 6, 12, 20, 32)
# A drafter of which one shape is timed alone has as many decodings as others have shapes.
TIMES_GIVEN = 3


def chain(depth: int, threshold: float = 0.0) -> DraftShape:
    """A chain, which a confidence below the threshold ends."""
    return DraftShape(depth, 1, depth, False, threshold)


def _trees() -> Iterator[DraftShape]:
    for depth in (2, 3, 4, 6, 8):
        for width in (2, 3):
            # The first level's children and each beam's after it: all that can be drafted.
            most = width + (depth - 1) * width * width
            for nodes in (4, 6, 8, 12, 16, 24):
                if depth < nodes <= most:
                    yield DraftShape(depth, width, nodes, True)


# Shapes by the kind that a strategy lets be searched; "nodes" are budgets of the given kind.
SEARCHED = {
    "chain": [chain(depth) for depth in range(1, 13)],
    "tree": list(_trees()),
    "nodes": [DraftShape(0, 1, nodes, False) for nodes in NODES],
    "threshold": [chain(d, t) for d in (6, 12) for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)],
}
# Shapes whose steps are timed; the fit says the rest.
TIMED = {
    "chain": [chain(depth) for depth in (1, 2, 4, 8, 12)],
    "tree": [
        DraftShape(depth, width, nodes, True)
        for depth, width, nodes in (
            *((2, 2, 4), (4, 2, 8), (4, 4, 12)),
            *((8, 2, 12), (6, 3, 16), (8, 4, 24)),
        )
    ],
    "nodes": [DraftShape(0, 1, nodes, False) for nodes in TIMED_NODES],
    "threshold": [],
}


@dataclass(frozen=True)
class Candidate:
    """A drafter in a shape: something that a bench arm could be.

    Attributes:
        name: name of the arm.
        type: registered strategy.
        options: options of the arm.
        drafter: name of the drafter without its shape; candidates that share it share weights.
        shape: draft shape, by which it costs.
        is_given: an arm of the configuration, not one that a search thought of.
    """

    name: str
    type: str
    options: dict[str, Any]
    drafter: str
    shape: DraftShape
    is_given: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """The same for the same strategy with the same options."""
        return repr((self.type, sorted(self.options.items())))

    @property
    def varies(self) -> bool:
        """Its drafts are often shorter than its shape, or empty."""
        return bool(self.shape.threshold) or strategy(self.type).shape_options.varies

    def cuts(self) -> Iterator["Candidate"]:
        """The candidate with at most 1, 2, 3, ... nodes where an option says so, itself last."""
        rule, shape = strategy(self.type).shape_options, self.shape
        is_fixed = not rule.names or any(option in self.options for option in rule.fixed)
        for nodes in () if is_fixed else (n for n in NODES if n < shape.nodes):
            depth = min(shape.depth, nodes)
            changed = {"depth": depth} if "depth" in rule.names else {}
            if shape.is_tree or "depth" not in rule.names:
                changed["nodes"] = nodes
            options = {rule.names[part]: value for part, value in changed.items()}
            yield Candidate(
                f"{nodes} nodes",
                self.type,
                {**self.options, **options},
                self.drafter,
                replace(shape, depth=depth, nodes=nodes),
            )
        yield replace(self, name=f"{shape.nodes} nodes")


@dataclass
class Family:
    """One drafter of the configuration: its arms, and the shapes it can take.

    Attributes:
        name: name of the drafter.
        kind: its type.
        base: its options without the shape.
        given: its arms.
    """

    name: str
    kind: str
    base: dict[str, Any]
    given: list[Candidate] = field(default_factory=list)

    def searched(self) -> list[Candidate]:
        """The given configurations first, then every other shape."""
        # By shape and not by options: an arm may leave out what is the default.
        given = {candidate.shape for candidate in self.given}
        found = [self._candidate(shape) for shape in self._shapes(SEARCHED) if shape not in given]
        return [*self.given, *found]

    def timed(self) -> list[Candidate]:
        """The shapes whose steps are timed, from which the others follow."""
        shapes = self._shapes(TIMED)
        if not shapes:
            return self.given * TIMES_GIVEN
        # A fit is not believed beyond what was timed: the largest given shapes are timed as well.
        by_size = sorted(
            (candidate.shape for candidate in self.given),
            key=lambda shape: (shape.nodes, shape.depth, shape.width),
            reverse=True,
        )
        for shape in by_size:
            plain = replace(shape, threshold=0.0)
            if not any(timed.covers(plain) for timed in shapes):
                shapes.append(plain)
        return [self._candidate(shape) for shape in shapes]

    def _shapes(self, table: Mapping[str, Sequence[DraftShape]]) -> list[DraftShape]:
        """Shapes of a table; none where the drafter is planned as configured."""
        rule = strategy(self.kind).shape_options
        if not is_searched(rule, self.base):
            return []
        found = [shape for kind in rule.searched for shape in table[kind]]
        if self.given[0].shape.is_tree and "nodes" in rule.searched:
            return [replace(shape, is_tree=shape.nodes > 1) for shape in found]
        return found

    def _candidate(self, shape: DraftShape) -> Candidate:
        names = strategy(self.kind).shape_options.names
        return Candidate(
            f"{self.name} {label(names, shape)}",
            self.kind,
            {**self.base, **to_options(names, shape)},
            self.name,
            shape,
        )


def is_searched(rule: ShapeOptions, options: Mapping[str, Any]) -> bool:
    """Tell if other shapes than the given one are tried."""
    is_sampled = options.get("children", "top") != "top"
    return bool(rule.searched) and not is_sampled and not any(o in options for o in rule.fixed)


def to_options(names: Mapping[str, str], shape: DraftShape) -> dict[str, Any]:
    """The options of a shape, under a strategy's names for its parts."""
    wanted: dict[str, Any] = {"depth": shape.depth, "width": shape.width}
    if shape.threshold:
        wanted["threshold"] = shape.threshold
    if shape.is_tree or "depth" not in names:
        wanted["nodes"] = shape.nodes
    return {names[part]: value for part, value in wanted.items() if part in names}


def label(names: Mapping[str, str], shape: DraftShape) -> str:
    """A shape in words, as in "chain 5" or "tree 5x2 of 7"."""
    if "depth" not in names:
        return f"{shape.nodes} nodes"
    if shape.is_tree:
        return f"tree {shape.depth}x{shape.width} of {shape.nodes}"
    ending = f" above {shape.threshold:g}" if shape.threshold else ""
    return f"chain {shape.depth}{ending}"


def families(arms: Sequence[ArmConfig], target: Any) -> list[Family]:
    """The drafters of a configuration; arms that differ in their shape alone are one.

    Arms of transformers are passed over; options that do not hold are refused.
    """
    found: dict[str, Family] = {}
    for arm in arms:
        if arm.type in SINGLE_PROMPT_TYPES:
            continue
        drafter: Any = load_drafter({"type": arm.type, **arm.options}, target)
        rule = strategy(arm.type).shape_options
        shape_options = set(rule.names.values()) if is_searched(rule, arm.options) else set()
        base = {key: value for key, value in arm.options.items() if key not in shape_options}
        key = repr(sorted({"type": arm.type, **base}.items()))
        if key not in found:
            taken = {family.name for family in found.values()}
            found[key] = Family(_unused_name(arm, taken), arm.type, base)
        family = found[key]
        family.given.append(
            Candidate(arm.name, arm.type, dict(arm.options), family.name, drafter.draft_shape, True)
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
