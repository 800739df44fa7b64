"""What a draft head is trained on: texts with what the target made of them."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Texts of B rows and L tokens, and the target's view of them.

    Attributes:
        tokens: [B, L] int64; padding may be any token.
        loss_mask: [B, L] bool, the tokens that are to be predicted: the target's own answers.
        hidden: tap -> [B, L, H].
        target_logits: [B, L, V]; row i predicts token i + 1.
        positions: [B, L] int64, each token's place in its own text, where several texts share a
            line; None where each has its own.
    """

    tokens: Tensor
    loss_mask: Tensor
    hidden: dict[int, Tensor]
    target_logits: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss and what it was made of.

    Attributes:
        loss: scalar, with its graph.
        parts: name -> detached scalar.
    """

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
