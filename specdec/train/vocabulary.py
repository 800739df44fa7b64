"""A head's draft vocabulary: the tokens that the target writes most, and how they start."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.train.data import AnswerRow


def most_frequent(rows: Sequence[AnswerRow], size: int, vocab_size: int) -> Tensor:
    """The `size` most frequent ids [size] of the answers, ascending; ties go to lower ids."""
    counts = _counts(rows, vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values


def coverage(rows: Sequence[AnswerRow], tokens: Tensor, vocab_size: int) -> float | None:
    """Share of the answers' tokens that are among these ids; None without rows."""
    counts = _counts(rows, vocab_size)
    return (counts[tokens].sum() / counts.sum()).item() if rows else None


def start_from_target(head: Any, projection: Tensor) -> None:
    """Start the head's own vocabulary projection, if it has one, as the target's rows.

    A head that is wider or narrower than the target keeps its random start.

    Args:
        head: its draft vocabulary is chosen.
        projection: [V, H] of the target.
    """
    own = getattr(head, "lm_head", None)
    if own is None or own.in_features != projection.shape[1]:
        return
    ids = head.token_map
    with torch.no_grad():
        own.weight.copy_(projection if ids is None else projection[ids])


def _counts(rows: Sequence[AnswerRow], vocab_size: int) -> Tensor:
    written = [
        token for row in rows for start, end in row.answers for token in row.tokens[start:end]
    ]
    return torch.bincount(torch.tensor(written, dtype=torch.long), minlength=vocab_size)
