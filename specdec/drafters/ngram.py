"""Prompt lookup: copy what followed the last tokens where they occurred before."""

from collections.abc import Sequence
from typing import ClassVar

from specdec.common.arguments import require_counts
from specdec.drafters.base import ShapeOptions
from specdec.drafters.lookup import LookupDrafter, Node, match_confidence


class NgramDrafter(LookupDrafter):
    """Looks the last n tokens up in the row's own prompt and output.

    The index lives on the host and grows with the committed tokens, so a step costs a few
    dictionary look-ups instead of a scan of the context.

    Args:
        num_draft_tokens: tokens copied from each place, at most.
        max_ngram: longest suffix looked up first.
        min_ngram: shortest suffix, at least 1.
        num_continuations: places to copy from; more than one makes a tree, longest and most
            recent match first, with equal beginnings joined.
        max_nodes: node budget of a tree; None for `num_draft_tokens * num_continuations`.

    Source: prompt lookup decoding (Saxena 2023); LLMA, arXiv 2304.04487.
    """

    kind, title = "ngram", "Prompt lookup"
    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {"nodes": "num_draft_tokens"}, ("nodes",), ("num_continuations",), varies=True
    )

    def __init__(
        self,
        num_draft_tokens: int = 8,
        max_ngram: int = 4,
        min_ngram: int = 2,
        num_continuations: int = 1,
        max_nodes: int | None = None,
    ) -> None:
        require_counts(
            num_draft_tokens=num_draft_tokens,
            num_continuations=num_continuations,
            max_nodes=max_nodes,
        )
        if not 1 <= min_ngram <= max_ngram <= 64:  # all sizes are indexed
            raise ValueError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}: "
                "choose 1 <= min_ngram <= max_ngram <= 64"
            )
        if num_continuations == 1:
            max_nodes = num_draft_tokens
        budget = max_nodes or num_draft_tokens * num_continuations
        super().__init__(budget, makes_trees=num_continuations > 1)
        self.num_draft_tokens, self.num_continuations = num_draft_tokens, num_continuations
        self._sizes = range(min_ngram, max_ngram + 1)

    def _begin(self, prompt: Sequence[int]) -> "_History":
        row = _History(self._sizes, self.num_continuations, self.num_draft_tokens)
        row.extend(prompt)
        return row


class _History:
    """The tokens of one row and, for every n-gram in them, the latest places it ended."""

    def __init__(self, sizes: range, num_places: int, num_copied: int) -> None:
        self._sizes, self._num_places, self._num_copied = sizes, num_places, num_copied
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens; an n-gram is indexed once something follows it."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size > end:
                    break
                places = self._ends.setdefault(tuple(self._tokens[end - size :]), [])
                places.append(end)
                if len(places) > self._num_places:
                    del places[0]
            self._tokens.append(token)

    def draft(self, budget: int) -> list[Node]:
        length = min(self._num_copied, budget)
        copies = [(size, self._tokens[end : end + length]) for end, size in self._places().items()]
        return merge(copies, budget)

    def _places(self) -> dict[int, int]:
        """Where the longest matching suffixes ended before, most recent first: end -> size."""
        places: dict[int, int] = {}
        for size in reversed(self._sizes):
            if size > len(self._tokens):
                continue
            for end in reversed(self._ends.get(tuple(self._tokens[-size:]), ())):
                # What matched a longer suffix matches this one too.
                places.setdefault(end, size)
                if len(places) == self._num_places:
                    return places
        return places


def merge(continuations: Sequence[tuple[int, Sequence[int]]], budget: int) -> list[Node]:
    """Join pairs of how long a match was and what followed it into one tree.

    Earlier ones are first in line for the budget of nodes.
    """
    nodes: list[Node] = []
    index: dict[tuple[int, int], int] = {}
    for length, continuation in continuations:
        parent, above = -1, 1.0
        for level, token in enumerate(continuation, 1):
            if (parent, token) not in index:
                if len(nodes) == budget:
                    return nodes
                index[parent, token] = len(nodes)
                nodes.append((parent, token, min(above, match_confidence(length, level))))
            parent = index[parent, token]
            above = nodes[parent][2]
    return nodes
