"""The configurations that are compared: those given, and other shapes of their drafters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig
from specdec.common.compile import bucket
from specdec.drafters.base import DraftShape, ShapeOptions
from specdec.registry import load_drafter, strategy

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# A drafter of which one shape is timed alone has as many decodings as others have shapes.
TIMES_GIVEN = 3


def chain(depth: int, threshold: float = 0.0) -> DraftShape:
    """A chain, which a confidence below the threshold ends."""
    return DraftShape(depth, 1, depth, False, threshold)


def budget(nodes: int) -> DraftShape:
    return DraftShape(0, 1, nodes, False)


def filled(shape: DraftShape) -> DraftShape:
    """The shape with all nodes that CUDA graphs of the target compute for it in any case."""
    nodes = bucket(shape.nodes + 1) - 1  # and the root
    return replace(shape, nodes=nodes, depth=nodes if shape == chain(shape.depth) else shape.depth)


# Shapes by the kind that a strategy lets be searched; "nodes" are budgets of the given kind.
SEARCHED = {
    "chain": [chain(depth) for depth in range(1, 13)],
    "tree": [
        DraftShape(depth, width, nodes, True)
        for depth in (2, 3, 4, 6, 8)
        for width in (2, 3)
        for nodes in (4, 6, 8, 12, 16, 24)
        # The first level's children and each beam's after it: all that can be drafted.
        if depth < nodes <= width + (depth - 1) * width * width
    ],
    "nodes": [budget(nodes) for nodes in NODES],
    "threshold": [chain(d, t) for d in (6, 12) for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)],
}
_TIMED_TREES = ((2, 2, 4), (4, 2, 8), (4, 4, 12), (8, 2, 12), (6, 3, 16), (8, 4, 24))
# Shapes whose steps are timed; the fit says the rest.
TIMED = {
    "chain": [chain(depth) for depth in (1, 2, 4, 8, 12)],
    "tree": [DraftShape(*sizes, is_tree=True) for sizes in _TIMED_TREES],
    "nodes": [budget(nodes) for nodes in (1, 3, 6, 12, 20, 32)],
    "threshold": [],
}


@dataclass(frozen=True)
class Candidate:
    """A drafter in a shape: something that a bench arm could be.

    Attributes:
        drafter: name of the drafter without its shape; candidates that share it share weights.
        is_given: an arm of the configuration, not one that a search thought of.
    """

    name: str
    type: str
    options: dict[str, Any]
    drafter: str
    shape: DraftShape
    is_given: bool = field(default=False, compare=False)

    @property
    def arm(self) -> dict[str, Any]:
        return {"type": self.type, **self.options}

    @property
    def key(self) -> str:
        """The same for the same strategy with the same options."""
        return repr(sorted(self.arm.items()))

    @property
    def rule(self) -> ShapeOptions:
        return strategy(self.type).shape_options

    @property
    def varies(self) -> bool:
        """Its drafts are often shorter than its shape, or empty."""
        return bool(self.shape.threshold) or self.rule.varies

    @property
    def is_fixed(self) -> bool:
        return not self.rule.names or any(option in self.options for option in self.rule.fixed)

    @property
    def is_searched(self) -> bool:
        """Other shapes than the given one are tried."""
        is_sampled = self.options.get("children", "top") != "top"
        return bool(self.rule.searched) and not is_sampled and not self.is_fixed

    def reshaped(self, shape: DraftShape) -> "Candidate":
        """The drafter in another shape, by the strategy's options for depth, width and so on."""
        names, words = self.rule.names, f"chain {shape.depth}"
        wanted: dict[str, Any] = {"depth": shape.depth, "width": shape.width}
        if shape.threshold:
            wanted["threshold"] = shape.threshold
            words += f" above {shape.threshold:g}"
        if shape.is_tree or "depth" not in names:
            wanted["nodes"] = shape.nodes
            words = f"tree {shape.depth}x{shape.width} of {shape.nodes}"
        if "depth" not in names:
            words = f"{shape.nodes} nodes"
        options = {names[part]: value for part, value in wanted.items() if part in names}
        name, options = f"{self.drafter} {words}", {**self.options, **options}
        return Candidate(name, self.type, options, self.drafter, shape)

    def cuts(self) -> list["Candidate"]:
        """The candidate with at most 1, 2, 3, ... nodes where an option says so, itself last."""
        sizes = [] if self.is_fixed else [n for n in NODES if n < self.shape.nodes]
        shapes = [replace(self.shape, depth=min(self.shape.depth, n), nodes=n) for n in sizes]
        return [*map(self.reshaped, shapes), self]


@dataclass(frozen=True)
class Family:
    """One drafter of the configuration: its arms, and the shapes it can take.

    Attributes:
        base: the drafter, with the options that do not shape its drafts.
        given: its arms.
        is_padded: the target pads what it scores, so that only some shapes are worth their time.
    """

    base: Candidate
    given: list[Candidate] = field(default_factory=list)
    is_padded: bool = False

    def searched(self) -> list[Candidate]:
        """The given configurations first, then every other shape."""
        # By shape and not by options: an arm may leave out what is the default.
        given = {candidate.shape for candidate in self.given}
        others = [shape for shape in self._shapes(SEARCHED) if shape not in given]
        return [*self.given, *map(self.base.reshaped, others)]

    def timed(self) -> list[Candidate]:
        """The shapes whose steps are timed, from which the others follow."""
        shapes = self._shapes(TIMED)
        if not shapes:
            return self.given * TIMES_GIVEN
        # A fit is not believed beyond what was timed: the largest given shapes are timed as well.
        for shape in sorted((candidate.shape for candidate in self.given), key=largest_first):
            plain = replace(shape, threshold=0.0)
            if not any(timed.covers(plain) for timed in shapes):
                shapes.append(plain)
        return [*map(self.base.reshaped, shapes)]

    def _shapes(self, table: Mapping[str, Sequence[DraftShape]]) -> list[DraftShape]:
        """Shapes of a table; none where the drafter is planned as configured."""
        kinds = self.base.rule.searched if self.base.is_searched else ()
        found = [shape for kind in kinds for shape in table[kind]]
        if self.is_padded:
            found = [*dict.fromkeys(map(filled, found))]
        if self.given[0].shape.is_tree and "nodes" in kinds:
            return [replace(shape, is_tree=shape.nodes > 1) for shape in found]
        return found


def largest_first(shape: DraftShape) -> tuple[float, ...]:
    return (-shape.nodes, -shape.depth, -shape.width, shape.threshold)


def families(arms: Sequence[ArmConfig], target: Any) -> list[Family]:
    """The drafters of a configuration; arms that differ in their shape alone are one.

    Arms of transformers are passed over; options that do not hold are refused.
    """
    found: dict[str, Family] = {}
    for arm in arms:
        if arm.type in SINGLE_PROMPT_TYPES:
            continue
        drafter: Any = load_drafter({"type": arm.type, **arm.options}, target)
        given = Candidate(arm.name, arm.type, arm.options, "", drafter.draft_shape, is_given=True)
        shaping = given.rule.names.values() if given.is_searched else ()
        rest = {key: value for key, value in arm.options.items() if key not in shaping}
        taken = {family.base.drafter for family in found.values()}
        names = (arm.type, arm.name, *(f"{arm.name} {n}" for n in range(2, len(taken) + 2)))
        name = next(each for each in names if each not in taken)
        base = replace(given, name=name, drafter=name, options=rest, is_given=False)
        is_padded = getattr(target, "compile_mode", "eager") == "graphs"
        family = found.setdefault(base.key, Family(base, is_padded=is_padded))
        family.given.append(replace(given, drafter=family.base.drafter))
    if not found:
        raise ValueError(
            "config arms holds no drafter to plan with; add at least one, like {type: ngram}"
        )
    return list(found.values())
