"""Drawing the last token of a step: what is left of the target once the draft was rejected."""

import torch
from torch import Tensor

# What a missing uniform stands for: where target rows are one-hot every acceptance probability is
# exactly 0 or 1, and any number strictly between decides alike.
ANY_UNIFORM = 0.5


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


def draw(weights: Tensor, fallback: Tensor, noise: Tensor | None) -> Tensor:
    """Draw one token per row proportionally to `weights`, or to `fallback` where they vanish.

    Args:
        weights: [B, V] non-negative, not necessarily normalised.
        fallback: [B, V] used in rows whose weights are all zero.
        noise: [B, V] Exp(1); None takes the largest weight, which is the draw of a one-hot row.

    Returns:
        [B] int64. A token of weight zero is never drawn, also where its noise is zero.

    Source: the exponential race; argmax(w / e) is categorical(w) for e i.i.d. Exp(1).
    """
    alive = weights.amax(1, keepdim=True) > 0
    weights = torch.where(alive, weights, fallback)
    if noise is None:
        return weights.argmax(1)
    return (weights / noise).masked_fill(weights <= 0, -1).argmax(1)
