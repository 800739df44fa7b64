"""Batches and losses that drafters are trained with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.common.arguments import nearest


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


OBJECTIVES = {
    "cross_entropy": "to the tokens that the target wrote",
    "soft_cross_entropy": "to the target's distribution: forward_kl and a constant",
    "forward_kl": "KL(target || drafter), which covers all that the target may say",
    "reverse_kl": "KL(drafter || target), which keeps to what it is likely to say",
    "total_variation": "one minus the acceptance rate of sampled drafts",
    "negative_log_acceptance": "minus the logarithm of that rate: steep where it is low",
    "lk_hybrid": "forward_kl where the rate is low, total_variation where it is high",
}
WEIGHTINGS = ("decay", "d_pace")
_ETA = 3.0  # how soon lk_hybrid goes over to total_variation
_FLOOR = 0.1  # of the acceptance that d_pace multiplies, so that deep places are never given up


def losses(
    name: str, logits: Tensor, target_logits: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """One of `OBJECTIVES` at each place: [places], of logits [places, V] and tokens [places].

    The larger vocabulary is cut; cross_entropy has no temperature.

    Sources: DistillSpec, arXiv 2310.08461 (divergences). The acceptance rate is the sum of
    min(p, q), Leviathan et al. 2022, arXiv 2211.17192, corollary 3.6; its logarithm and the hybrid:
    LK losses, arXiv 2602.23881.
    """
    if name not in OBJECTIVES:
        near = nearest(name, OBJECTIVES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"objective is {name!r} but must be one of {', '.join(OBJECTIVES)}{hint}")
    mine, goal = _paired(logits, target_logits)
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(mine, tokens, reduction="none")
    mine, goal = (mine / temperature).log_softmax(-1), (goal / temperature).log_softmax(-1)
    if name == "soft_cross_entropy":
        return -(goal.exp() * mine).sum(-1)
    if name in ("forward_kl", "reverse_kl"):
        first, second = (goal, mine) if name == "forward_kl" else (mine, goal)
        return (first.exp() * (first - second)).sum(-1)
    rate = torch.minimum(goal, mine).exp().sum(-1)
    if name == "total_variation":
        return 1 - rate
    if name == "negative_log_acceptance":
        return -rate.clamp(min=torch.finfo(rate.dtype).tiny).log()
    share = (-_ETA * rate.detach()).exp()
    return share * (goal.exp() * (goal - mine)).sum(-1) + (1 - share) * (1 - rate)


def objective(
    name: str, logits: Tensor, target_logits: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """The mean of `losses`; 0 for no places: callers pick the places that count first."""
    return _mean(losses(name, logits, target_logits, tokens, temperature), logits)


class Level(NamedTuple):
    """The drafts of a head at one level, at the places that count."""

    logits: Tensor  # [places, V]
    target_logits: Tensor  # [places, V]
    tokens: Tensor  # [places] that the target wrote
    mask: Tensor  # [B, L] the places, by where their chains begin


def chain_loss(
    levels: Iterable[Level], objective: str, decay: float, weighting: str = "decay"
) -> LossOutput:
    """Add up an objective over the levels of the chains that begin at each place.

    With "decay" a level weighs `decay` times what the one above it does. With "d_pace" a place
    weighs what it adds to the expected accepted length of its chain: the sum, over the levels from
    its own downwards, of the chance that the chain gets through them.

    Source: D-PACE, arXiv 2605.18810, which takes the drafter's probability of the text's token for
    the acceptance; here it is the sum of min(p, q), never below a floor.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r} but must be one of {', '.join(WEIGHTINGS)}")
    found: list[tuple[Tensor, Level]] = []
    reached: list[Tensor] = []  # [B, L] chance that a chain gets through each level
    for level in levels:
        found.append((losses(objective, *level[:3]), level))
        if weighting == "d_pace":
            mine, goal = _paired(level.logits.detach(), level.target_logits)
            rate = torch.minimum(mine.softmax(-1), goal.softmax(-1)).sum(-1)
            chance = rate.new_zeros(level.mask.shape)
            chance[level.mask] = _FLOOR + (1 - _FLOOR) * rate
            reached.append(chance * reached[-1] if reached else chance)
    total, parts, ahead = found[0][0].new_zeros(()), {}, torch.zeros(())
    for depth in reversed(range(len(found))):
        each, level = found[depth]
        weight: Tensor | float = decay**depth
        if reached:
            ahead = ahead.to(reached[depth]) + reached[depth]
            weight = ahead[level.mask]
        total = total + _mean(weight * each, level.logits)
        parts[f"{objective}_{depth + 1}"] = _mean(each.detach(), level.logits).detach()
    return LossOutput(total, dict(reversed(parts.items())))


def _paired(logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    size = min(logits.shape[-1], target_logits.shape[-1])
    return logits[..., :size].float(), target_logits[..., :size].float()


def _mean(each: Tensor, logits: Tensor) -> Tensor:
    return each.mean() if len(each) else logits.sum().float()
