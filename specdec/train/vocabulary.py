"""A reduced draft vocabulary: the tokens that the target writes most."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.data.answers import AnswerRow


def most_frequent(rows: Sequence[AnswerRow], size: int, vocab_size: int) -> Tensor:
    """The `size` most frequent ids [size] of the answers, ascending; ties go to lower ids."""
    counts = _counts(rows, vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values


def coverage(rows: Sequence[AnswerRow], tokens: Tensor, vocab_size: int) -> float | None:
    """Share of the answers' tokens that are among these ids; None without rows."""
    counts = _counts(rows, vocab_size)
    return (counts[tokens].sum() / counts.sum()).item() if rows else None


def _counts(rows: Sequence[AnswerRow], vocab_size: int) -> Tensor:
    written = [
        token for row in rows for start, end in row.answers for token in row.tokens[start:end]
    ]
    return torch.bincount(torch.tensor(written, dtype=torch.long), minlength=vocab_size)
