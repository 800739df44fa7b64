"""Drawing the last token of a step: what is left of the target once the draft was rejected."""

import torch
from torch import Tensor


def work_dtype(target_probs: Tensor) -> torch.dtype:
    """Name the dtype of the arithmetic: float32, or float64 for float64 input."""
    return torch.promote_types(target_probs.dtype, torch.float32)


def select_row(target_probs: Tensor, row: Tensor) -> Tensor:
    """Copy one target row per batch row: [B, N + 1, V] at [B] -> [B, V] in the work dtype."""
    batch = torch.arange(row.shape[0], device=row.device)
    return target_probs[batch, row].to(work_dtype(target_probs))


def token_probs(target_probs: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Read single probabilities: target row `rows` [B, N] at `tokens` [B, N], in the work dtype.

    Reads B x N numbers of the B x N x V, which is what makes verification cheap.
    """
    batch = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    return target_probs[batch, rows, tokens].to(work_dtype(target_probs))


def strike(row: Tensor, tokens: Tensor, is_struck: Tensor) -> Tensor:
    """Zero the marked tokens of a row, unless nothing would be left of it.

    Args:
        row: [B, V] target probabilities; a fresh copy, overwritten.
        tokens: [B, K] in the vocabulary.
        is_struck: [B, K] bool; a token may stand in marked and unmarked columns.
    """
    before = row.gather(1, tokens)
    # Minimum and maximum, not a plain scatter: the other columns must not undo the marked ones.
    # Both touch K entries a row; a `torch.where` for the fallback would pass over the vocabulary.
    row.scatter_reduce_(1, tokens, before.masked_fill(is_struck, 0), "amin")
    return row.scatter_reduce_(1, tokens, before.masked_fill(has_mass(row), 0), "amax")


def has_mass(weights: Tensor) -> Tensor:
    """Tell whether a draw from [B, V] weights is possible, bool [B, 1].

    Weights so small that dividing them by the noise would underflow count as none; in a residual
    they are rounding errors.
    """
    return weights.amax(1, keepdim=True) > 128 * torch.finfo(weights.dtype).tiny


def draw(weights: Tensor, noise: Tensor) -> Tensor:
    """Draw one token per row proportionally to `weights`.

    Args:
        weights: [B, V] non-negative, not necessarily normalized, with mass in every row.
        noise: [B, V] Exp(1).

    Returns:
        [B] int64. A token of weight zero is never drawn, also where its noise is zero.

    Source: the exponential race; argmax(w / e) is categorical(w) for e i.i.d. Exp(1).
    """
    # Without the floor 0 / 0 would be NaN, and NaN wins every maximum.
    return (weights / noise.clamp(min=torch.finfo(noise.dtype).tiny)).max(1).indices
