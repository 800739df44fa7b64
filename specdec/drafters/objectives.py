"""What a drafter's distribution is pulled towards, at single places.

All of them are means over the places, in nats but for total variation, which is a probability.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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
        name: of the objective.
        logits: [places, V] of the drafter, with their graph.
        target_logits: [places, V] of the target; a larger vocabulary is cut, and so are logits.
        tokens: [places] int64 that the target wrote.
        temperature: that both distributions are compared at.

    Raises:
        ValueError: no such objective.
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
