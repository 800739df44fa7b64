"""Prompt lookup: copy what followed the last tokens where they occurred before."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from specdec.common.arguments import require_counts
from specdec.drafters.base import BaseDrafter, ShapeOptions
from specdec.drafters.lookup import merge, pack_rows
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict


class NgramDrafter(BaseDrafter):
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
    expected: Sequence[float] = ()  # accepted tokens expected of each row's last draft

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
        self.num_draft_tokens = num_draft_tokens
        self.num_continuations = num_continuations
        self.makes_trees = num_continuations > 1
        self.max_nodes = num_draft_tokens
        if self.makes_trees:
            self.max_nodes = max_nodes or num_draft_tokens * num_continuations
        self._sizes = range(min_ngram, max_ngram + 1)
        self._rows: list[_History] = []

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Index the prompts."""
        begun = [_History(self._sizes, self.num_continuations) for _ in prompts]
        for row, prompt in zip(begun, prompts, strict=True):
            row.extend(prompt)
        self._rows = [*self._rows, *begun] if join else begun

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Copy what followed the latest tokens; no node where they are new."""
        rows = []
        for row, limit in zip(self._rows, budget, strict=True):
            length = min(self.num_draft_tokens, limit)
            found = row.continuations(length) if limit else []
            rows.append(merge(found, min(limit, self.max_nodes)))
        self.expected = [sum(confidences) for _, confidences in rows]
        return pack_rows(
            [nodes for nodes, _ in rows],
            root.device,
            as_chain=not self.makes_trees,
            confidences=[confidences for _, confidences in rows],
        )

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Index the new tokens."""
        for row, tokens in zip(self._rows, committed, strict=True):
            row.extend(tokens)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        self._rows = [self._rows[row] for row in rows.tolist()]


class _History:
    """The tokens of one row and, for every n-gram in them, the latest places it ended."""

    def __init__(self, sizes: range, num_places: int) -> None:
        self._sizes = sizes
        self._num_places = num_places
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

    def continuations(self, length: int) -> list[tuple[int, list[int]]]:
        """The longest matching suffixes' sizes and what followed them, most recent first."""
        return [(size, self._tokens[end : end + length]) for end, size in self._places().items()]

    def _places(self) -> dict[int, int]:
        """Where the longest matching suffixes ended before, and how long they are."""
        places: dict[int, int] = {}
        for size in reversed(self._sizes):
            if size > len(self._tokens):
                continue
            for end in reversed(self._ends.get(tuple(self._tokens[-size:]), ())):
                # What matched a longer suffix matches this one too.
                if end in places:
                    continue
                places[end] = size
                if len(places) == self._num_places:
                    return places
        return places
