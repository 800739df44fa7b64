"""What a drafter offers so that its acceptance can be worked out without decoding.

All of it is optional: a drafter without it is replayed along the text instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from specdec.verify.tree import StaticTree


@dataclass(frozen=True, eq=False)
class FixedShape:
    """A draft whose nodes are known before a token is seen.

    Attributes:
        tree: its nodes, in the order in which a budget keeps them.
        children: how tokens are taken above temperature 0, see `specdec.drafters.tree_growth`.
        threshold: a chain ends where the product of the highest probabilities falls below it.
    """

    tree: StaticTree
    children: str
    threshold: float = 0.0


@runtime_checkable
class Forced(Protocol):
    """A drafter that can be given a whole text.

    Attributes:
        shape_options: options of `load_drafter` that change which nodes are drafted, but not what
            `forced` says.
    """

    taps: tuple[int, ...]
    shape_options: ClassVar[frozenset[str]]

    @property
    def children(self) -> str:
        """How its fixed shapes take tokens above temperature 0, see `FixedShape`."""

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


def is_forced(drafter: Any) -> bool:
    """Whether a drafter can be given a whole text."""
    return isinstance(drafter, Forced)
