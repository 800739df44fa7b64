"""Committed tokens with the target's features, kept until a draft is next asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, dict[int, Tensor], list[int]]


class Pending:
    """What some steps committed: parts of [B, n] tokens with their taps, ragged rows.

    Steps that draft nothing only add to it, so that they cost what plain decoding costs.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self.num_columns = 0  # of all parts; no row has more entries

    def add(self, tokens: Tensor, taps: dict[int, Tensor], counts: Sequence[int]) -> None:
        """Add a step: tokens [B, n], each tap [B, n, H]; the first `counts[b]` of row b count."""
        self._parts.append((tokens, taps, list(counts)))
        self.num_columns += tokens.shape[1]

    def clear(self) -> None:
        """Forget everything."""
        self._parts, self.num_columns = [], 0

    def join(self, num_rows: int) -> None:
        """Rows without an entry come behind the others."""
        if not self._parts:
            return
        tokens, taps, counts = self.take()
        taps = {tap: _with_rows(states, num_rows) for tap, states in taps.items()}
        self.add(_with_rows(tokens, num_rows), taps, [*counts, *[0] * num_rows])

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        if not self._parts:
            return
        tokens, taps, counts = self.take()
        kept = [counts[row] for row in rows.tolist()]
        self.add(tokens[rows], {tap: states[rows] for tap, states in taps.items()}, kept)

    def take(self) -> Part:
        """All parts as one, every row's entries moved up behind each other; forgets them."""
        parts = self._parts
        self.clear()
        if len(parts) == 1:
            return parts[0]
        tokens = torch.cat([part[0] for part in parts], 1)
        taps = {tap: torch.cat([part[1][tap] for part in parts], 1) for tap in parts[0][1]}
        counts = [sum(row) for row in zip(*(part[2] for part in parts), strict=True)]
        if min(counts) == tokens.shape[1]:
            return tokens, taps, counts
        index = _places(parts, max(counts)).to(tokens.device)  # [B, longest]
        tokens = tokens.gather(1, index)
        taps = {tap: _gather(states, index) for tap, states in taps.items()}
        return tokens, taps, counts


def _with_rows(values: Tensor, num_rows: int) -> Tensor:
    """Rows of zeros behind those of [B, ...]."""
    return torch.cat([values, values.new_zeros(num_rows, *values.shape[1:])])


def _places(parts: list[Part], width: int) -> Tensor:
    """The columns of every row's entries, 0 padded."""
    rows: list[list[int]] = [[] for _ in parts[0][2]]
    first = 0
    for tokens, _, counts in parts:
        for row, count in zip(rows, counts, strict=True):
            row.extend(range(first, first + count))
        first += tokens.shape[1]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Entries [B, n, H] at index [B, m]."""
    return states.gather(1, index.unsqueeze(2).expand(-1, -1, states.shape[2]))
