"""The base of lookup drafters: rows with texts of their own, and nodes packed into a draft."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.drafters.base import BaseDrafter, Tokens, padded
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict

# One node: (parent's index in its row or -1, token, confidence).
Node = tuple[int, int, float]


class LookupDrafter(BaseDrafter):
    """Drafts what followed the latest tokens where they occurred before; it has no model.

    Each of its rows has `extend(tokens)` and `draft(budget)`, which returns nodes, best first.

    Attributes:
        expected: accepted tokens expected of each row's last draft.
    """

    expected: Sequence[float] = ()
    needs_target = False
    engine_methods: ClassVar[Mapping[str, str]] = {"vllm": "custom_class"}

    def __init__(self, max_nodes: int, *, makes_trees: bool) -> None:
        self.max_nodes, self.makes_trees = max_nodes, makes_trees
        self._rows: list[Any] = []

    def _begin(self, prompt: Sequence[int]) -> Any:
        """A new row."""
        raise NotImplementedError

    def _leave(self, rows: Sequence[Any]) -> None:
        """Part with rows that end."""

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        if not join:
            self._leave(self._rows)
            self._rows = []
        self._rows += [self._begin(prompt) for prompt in prompts]

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        found = [
            row.draft(min(limit, self.max_nodes)) if limit else []
            for row, limit in zip(self._rows, budget, strict=True)
        ]
        self.expected = [sum(confidence for *_, confidence in nodes) for nodes in found]
        return pack_rows(found, root.device, as_chain=not self.makes_trees)

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        for row, tokens in zip(self._rows, committed, strict=True):
            row.extend(tokens)

    def reorder(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self._leave([row for index, row in enumerate(self._rows) if index not in kept])
        self._rows = [self._rows[row] for row in kept]


def pack_rows(rows: Sequence[list[Node]], device: torch.device, *, as_chain: bool) -> Draft:
    """Pad the rows' nodes, in topological order, to one deterministic draft.

    With `as_chain` every row is a chain, so that no parents are needed.
    """
    if not any(rows):
        return Draft.empty(len(rows), device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    filled = padded(rows, (-1, -1, 0.0))
    ids = [[[node[part] for node in row] for row in filled] for part in (0, 1)]
    parents, tokens = torch.tensor(ids, device=device)
    confidence = torch.tensor([[node[2] for node in row] for row in filled], device=device)
    if as_chain:
        return Draft.chain(tokens, lengths, confidence=confidence)
    depth = max(map(_depth, rows))
    return Draft.tree(tokens, parents, lengths, depth, confidence=confidence)


def _depth(row: list[Node]) -> int:
    depths: list[int] = []
    for parent, *_ in row:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def match_confidence(length: int, level: int) -> float:
    """Confidence that a copied text goes on as its source did, down to a level (1, 2, ...).

    A match of n tokens is followed by its continuation with a chance of about n / (n + 1) (the
    rule of succession), and every token taken makes the match one longer: the product of the
    chances is n / (n + level).
    """
    return length / (length + level)
