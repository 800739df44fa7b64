"""Batches and losses that drafters are trained with."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Texts of B rows and L tokens, and the target's view of them."""

    tokens: Tensor  # [B, L] int64; padding may be any token
    loss_mask: Tensor  # [B, L] bool, the tokens to be predicted: the target's own answers
    hidden: dict[int, Tensor]  # tap -> [B, L, H]
    target_logits: Tensor  # [B, L, V]; row i predicts token i + 1
    # [B, L] each token's place in its own text, where several texts share a line.
    positions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A scalar loss with its graph, and the detached scalars that it was made of, by name."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def shifted(rows: Tensor, by: int) -> Tensor:
    """Rows [B, L, ...] moved `by` places to the left; the places that open hold zeros."""
    if by == 0:
        return rows
    moved = rows.new_zeros(rows.shape)
    moved[:, :-by] = rows[:, by:]
    return moved


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits [M, V] to the target's distribution; 0 for no rows.

    Callers pick the places that count first, so that nothing is spent on the others.
    """
    if not len(logits):
        return logits.sum().float()
    goal = target_logits.float().softmax(-1)
    return -(goal * logits.float().log_softmax(-1)).sum(-1).mean()


# In this order: to the tokens that the target wrote; KL(target || drafter), which covers all that
# the target may say; KL(drafter || target), which keeps to what it is likely to say; and half the
# sum of |target - drafter|, which is one minus the acceptance rate of sampled drafts (DistillSpec,
# arXiv 2310.08461; the identity: Leviathan et al. 2022, arXiv 2211.17192, corollary 3.6).
OBJECTIVES = ("cross_entropy", "forward_kl", "reverse_kl", "total_variation")


def objective(
    name: str, logits: Tensor, target_logits: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """One of `OBJECTIVES`, of logits [places, V] and tokens [places]; 0 for no places.

    The larger vocabulary is cut; cross-entropy has no temperature.
    """
    if not len(logits):
        return logits.sum().float()
    size = min(logits.shape[-1], target_logits.shape[-1])
    mine, goal = logits[:, :size].float(), target_logits[:, :size].float()
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(mine, tokens)
    mine, goal = mine / temperature, goal / temperature
    if name == "total_variation":
        return 0.5 * (goal.softmax(-1) - mine.softmax(-1)).abs().sum(-1).mean()
    mine, goal = mine.log_softmax(-1), goal.log_softmax(-1)
    first, second = (goal, mine) if name == "forward_kl" else (mine, goal)
    return (first.exp() * (first - second)).sum(-1).mean()
