"""Batches, losses and rollouts that drafters are trained with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
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


def cross_entropy(logits: Tensor, target_logits: Tensor, tokens: Tensor) -> Tensor:
    """To the tokens that the target wrote."""
    return torch.nn.functional.cross_entropy(logits, tokens)


def forward_kl(logits: Tensor, target_logits: Tensor, tokens: Tensor) -> Tensor:
    """KL(target || drafter): covers all that the target may say."""
    goal, mine = target_logits.log_softmax(-1), logits.log_softmax(-1)
    return (goal.exp() * (goal - mine)).sum(-1).mean()


def reverse_kl(logits: Tensor, target_logits: Tensor, tokens: Tensor) -> Tensor:
    """KL(drafter || target): keeps to what the target is likely to say."""
    goal, mine = target_logits.log_softmax(-1), logits.log_softmax(-1)
    return (mine.exp() * (mine - goal)).sum(-1).mean()


def total_variation(logits: Tensor, target_logits: Tensor, tokens: Tensor) -> Tensor:
    """Half the sum of |target - drafter|: one minus the acceptance rate of sampled drafts.

    Source: DistillSpec, arXiv 2310.08461; the identity: Leviathan et al. 2022, arXiv 2211.17192,
    corollary 3.6.
    """
    return 0.5 * (target_logits.softmax(-1) - logits.softmax(-1)).abs().sum(-1).mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
}


def objective(
    name: str, logits: Tensor, target_logits: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """One of `OBJECTIVES`; 0 for no places.

    Args:
        name: the objective.
        logits: [places, V] of the drafter, with their graph.
        target_logits: [places, V] of the target; a larger vocabulary is cut, and so are logits.
        tokens: [places] int64 that the target wrote.
        temperature: that both distributions are compared at.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective is {name!r} but must be one of {', '.join(OBJECTIVES)}")
    if not len(logits):
        return logits.sum().float()
    size = min(logits.shape[-1], target_logits.shape[-1])
    mine, goal = logits[:, :size].float(), target_logits[:, :size].float()
    if name == "cross_entropy":
        return cross_entropy(mine, goal, tokens)
    return OBJECTIVES[name](mine / temperature, goal / temperature, tokens)


class StepCache:
    """Keys and values of all steps so far, with their gradients, for layers that expect a cache."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """Add a step's keys and values [B, heads, L, head_dim]; returns those of all steps."""
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)


def step_mask(length: int, step: int, device: torch.device, window: int | None = None) -> Tensor:
    """Who sees whom at a step: bool [1, 1, L, (step + 1) * L].

    A window bounds how many places of step 0 are seen, as in `FeatureDrafter`.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return torch.cat([causal, *[itself] * step], 1)[None, None]


def rollout(
    head: Any, tokens: Tensor, features: Tensor, num_steps: int, window: int | None = None
) -> Iterator[Tensor]:
    """Yield the head's outputs [B, L, F] of each step; step k at place i predicts t_{i+2+k}.

    Args:
        head: a `FeatureHead`.
        tokens: [B, L] int64.
        features: [B, L, F] of the target, fused.
        num_steps: at least 1.
        window: places that the head may look back at; None for all of them.
    """
    length, cache = tokens.shape[1], StepCache()
    places = torch.arange(length, device=tokens.device).expand(tokens.shape)
    for step in range(num_steps):
        mask = step_mask(length, step, tokens.device, window)
        outputs = head(shifted(tokens, 1 + step), features, places + step, mask, cache)
        yield outputs
        features = head.carry(outputs)
