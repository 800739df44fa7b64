"""Defaults of all draft strategies, and the facts that each class states about its method.

A registered class derives from `BaseDrafter`. Nothing outside its file knows a strategy by name:
planner, trainer, reports and checkpoints ask the class that `specdec.registry.strategy` returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.engine.metrics import ForwardClock
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict
from specdec.verify.tree import StaticTree

Tokens = Sequence[Sequence[int]]  # ids row by row, of any lengths


@dataclass(frozen=True)
class DraftShape:
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

    def covers(self, other: "DraftShape") -> bool:
        """Tell if a draft of the other shape is a part of one of this shape."""
        return (
            self.is_tree == other.is_tree
            and self.depth >= other.depth
            and self.width >= other.width
            and self.nodes >= other.nodes
            and self.threshold <= other.threshold
        )


@dataclass(frozen=True)
class ShapeOptions:
    """Options of a strategy that set the shape of its drafts.

    Attributes:
        names: the option of each of "depth", "width", "nodes" and "threshold" that there is.
        searched: kinds of shape that the planner tries: "chain", "tree", "nodes" (a budget alone)
            and "threshold".
        fixed: options that fix the shape, so that it is planned as it is given.
        varies: drafts are often shorter than the shape, or empty.
    """

    names: Mapping[str, str]
    searched: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    varies: bool = False

    @property
    def all(self) -> frozenset[str]:
        """All options that change which nodes are drafted, and nothing else."""
        return frozenset((*self.names.values(), *self.fixed, "children"))


@dataclass(frozen=True, eq=False)
class FixedShape:
    """A draft whose nodes are known before a token is seen."""

    tree: StaticTree  # its nodes, in the order in which a budget keeps them
    children: str  # how tokens are taken above temperature 0, as in `TreeShape`
    # A chain ends where the product of the highest probabilities falls below it.
    threshold: float = 0.0


class BaseDrafter:
    """A drafter that remembers nothing and reads no hidden states: add `propose` and use it.

    Attributes:
        kind: the name of a strategy of ours in the registry.
        title: its name in reports; empty for `kind`.
        shape_options: how the shape of its drafts is set.
        head_class: the `specdec.drafters.heads.Head` that it drafts with; None for none.
        trained_as: how `specdec train` trains it: "head", "language_model", or not at all.
        engine_methods: its name in each serving engine that runs it, see `specdec export`.
        taps: hidden states of the target that it reads.
        max_nodes: most nodes of a draft.
        makes_trees: its drafts may have parents.
        needs_target: it reads what a target or a sampler gives. If not, None may stand for `output`
            and `sampler`, and {} for `hidden`: an engine that passes token ids alone can ask it.
    """

    kind: ClassVar[str] = ""
    title: ClassVar[str] = ""
    shape_options: ClassVar[ShapeOptions] = ShapeOptions({}, varies=True)
    head_class: ClassVar[Any] = None
    trained_as: ClassVar[Literal["head", "language_model"] | None] = None
    engine_methods: ClassVar[Mapping[str, str]] = {}

    taps: tuple[int, ...] = ()
    max_nodes: int = 8
    makes_trees: bool = False
    needs_target: bool = True

    @cached_property
    def clock(self) -> ForwardClock:
        """The time spent in the drafter's own model, none by default."""
        return ForwardClock(torch.device("cpu"))

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Start a new batch; see `Drafter`."""

    def catch_up(self) -> None:
        """Read the prompts that wait for the first draft; see `CatchesUp`."""

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Draft at most `budget[b]` nodes after `root[b]`; see `Drafter`."""
        raise NotImplementedError(f"{type(self).__name__} must define propose")

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        """Learn what was kept; see `Drafter`."""

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows; see `Drafter`."""

    @property
    def draft_shape(self) -> DraftShape:
        """The shape of its drafts."""
        return DraftShape(0, 1, self.max_nodes, self.makes_trees)


@runtime_checkable
class Forced(Protocol):
    """A drafter whose acceptance can be worked out without decoding: it is given a whole text.

    It is optional; a drafter without it is replayed along the text instead.
    """

    taps: tuple[int, ...]
    shape_options: ClassVar[ShapeOptions]

    @property
    def children(self) -> str:
        """Manner in which its fixed shapes take tokens above temperature 0, see `FixedShape`."""

    @property
    def fixed_shape(self) -> FixedShape | None:
        """The nodes it drafts; None where that depends on the tokens."""

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """Its logits along a text, in the target's vocabulary, one level after the other.

        Level k (0, 1, ...) at place i guesses token i + 2 + k after the text's own tokens up to
        i + 1 + k, given the target's features up to i: what a chain that equals the text drafts
        behind the root i + 1. Places run from `first` to L - 2 - k. The batch it was drafting for
        is forgotten.

        Args:
            tokens: [L] int64.
            hidden: tap -> [L, H], the target's.
            depth: levels, at most; a drafter that is bound to a depth yields no more than that.
            first: the first place.

        Yields:
            [L - 1 - k - first, V]; -inf for a token it cannot say, and in the whole row where it
            drafts nothing.
        """


class CachePasser(BaseDrafter):
    """A drafter whose cache is that of others: what an engine asks of it is passed on to them."""

    _holders: Sequence[Any]
    _num_fed = 0  # slots that the drafter needs behind the committed ones

    @property
    def cache_bytes(self) -> int:
        return sum(holder.cache_bytes for holder in self._holders)

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        return sum(each.bytes_for(num_rows, num_slots + self._num_fed) for each in self._holders)

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        for holder in self._holders:
            holder.reserve(num_rows, num_slots + self._num_fed, join=join)

    def wipe(self, rows: Sequence[int]) -> None:
        for holder in self._holders:
            holder.wipe(rows)


def padded(rows: Sequence[Sequence[Any]], fill: Any) -> list[list[Any]]:
    """Rows of equal length, filled up at the end."""
    width = max(map(len, rows), default=0)
    return [[*row, *[fill] * (width - len(row))] for row in rows]


def set_apart(rows: Sequence[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """Return all other rows, and the order that puts these back from behind them."""
    others = [row for row in range(num_rows) if row not in rows]
    return torch.tensor(others), torch.tensor([*others, *rows]).argsort()


def in_parts(counts: Sequence[int], size: int) -> Iterator[tuple[slice, list[int]]]:
    """Columns of ragged rows, `size` at a time, and how many of them count in each row."""
    for start in range(0, max(counts), size):
        end = min(start + size, max(counts))
        yield slice(start, end), [min(max(n - start, 0), end - start) for n in counts]
