"""What two distributions over the next token, and the token that came, say about acceptance."""

from typing import Any

import torch
from torch import Tensor

from specdec.sampling.sampler import Sampler

# Rows are compared in chunks, which bounds the memory of vocabularies.
CHUNK = 128


def compare(
    draft_logits: Tensor, target_logits: Tensor, tokens: Tensor, sampler: Sampler, num_siblings: int
) -> dict[str, Tensor]:
    """Facts of n places, on the CPU; see `Evidence` for what they mean.

    Args:
        draft_logits: [n, V], -inf for what the drafter cannot say.
        target_logits: [n, V].
        tokens: [n] that the text goes on with.
        sampler: of one row.
        num_siblings: draws at a place, for `accept` [n, num_siblings].
    """
    parts = [
        _compare(
            draft_logits[start : start + CHUNK],
            target_logits[start : start + CHUNK],
            tokens[start : start + CHUNK],
            sampler,
            num_siblings,
        )
        for start in range(0, len(tokens), CHUNK)
    ]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _compare(
    draft_logits: Tensor, target_logits: Tensor, tokens: Tensor, sampler: Sampler, num_siblings: int
) -> dict[str, Tensor]:
    column = tokens.unsqueeze(1)
    q, p = _shares(draft_logits), _shares(target_logits)
    confidence, best_draft = q.max(-1)
    facts: dict[str, Tensor] = {
        "rank": ranks(draft_logits, column),
        "draft_prob": _at(q, column),
        "target_prob": _at(p, column),
        "confidence": confidence,
        "best_draft": best_draft,
        "best_target": target_logits.argmax(-1),
        "draft_entropy": _entropy(q),
        "target_entropy": _entropy(p),
    }
    # The laws that tokens are drawn from. Where a drafter can say nothing its law is empty.
    q = sampler.probs(draft_logits.unsqueeze(0))[0].nan_to_num(0.0)
    q = q.masked_fill(~draft_logits.amax(-1, keepdim=True).isfinite(), 0.0)
    p = sampler.probs(target_logits.unsqueeze(0))[0]
    facts["possible"] = _at(p, column) > 0
    # Rounding may lift the overlap of two equal distributions above 1.
    facts["overlap"] = torch.minimum(p, q).sum(-1).clamp(max=1)
    facts["accept"] = sibling_acceptance(p, q, tokens, num_siblings)
    return facts


def _shares(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).nan_to_num(0.0)


def _at(rows: Tensor, column: Tensor) -> Tensor:
    return rows.gather(1, column).squeeze(1)


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def ranks(logits: Tensor, column: Tensor) -> Tensor:
    """How many tokens stand before each row's [n, 1] token, earlier ones first where logits tie.

    A token that cannot be said stands behind all of them: [n] in [0, V].
    """
    own = logits.gather(1, column)
    before = torch.arange(logits.shape[1], device=logits.device) < column
    rank = ((logits > own) | ((logits == own) & before)).sum(-1)
    return torch.where(own.squeeze(1) == float("-inf"), logits.shape[1], rank)


def sibling_acceptance(p: Tensor, q: Tensor, tokens: Tensor, num_siblings: int) -> Tensor:
    """Probability [n, num_siblings] that the j-th of siblings drawn from q is the one accepted.

    Given that the step emits the text's token, over the draws and the uniforms of the token rule:
    with p_1 = p and p_{j+1} the normalised positive part of p_j - q, the j-th is accepted and is x
    with probability prod_{l<j} (1 - sum min(p_l, q)) min(p_j, q)(x). The residuals do not depend
    on what was drawn, because draws are with replacement.

    Args:
        p: [n, V] the target's law.
        q: [n, V] the drafter's law, or zeros where it drafts nothing.
        tokens: [n] x; 0 is said of a token that the target never emits.
        num_siblings: at least 1.

    Source: Leviathan et al. 2022, arXiv 2211.17192; SpecInfer, arXiv 2305.09781.
    """
    column = tokens.unsqueeze(1)
    emitted = _at(p, column)
    weights, survival = p, torch.ones_like(emitted)
    accepted = []
    for _ in range(num_siblings):
        mass = weights.sum(-1, keepdim=True)
        law = weights / mass.clamp(min=torch.finfo(weights.dtype).tiny)
        both = torch.minimum(law, q)
        accepted.append(survival * _at(both, column))
        survival = survival * (1 - both.sum(-1)).clamp(min=0)
        weights = (law - q).clamp(min=0)
    joint = torch.stack(accepted, 1)
    given = joint / emitted.clamp(min=torch.finfo(joint.dtype).tiny).unsqueeze(1)
    return given.masked_fill(emitted.unsqueeze(1) == 0, 0.0).clamp(max=1)


def refuse_not_finite(name: str, logits: Tensor, index: int, *, may_ban: bool = False) -> None:
    """Refuse NaN.

    Args:
        name: "target" or the drafter's.
        logits: [n, V] along a text.
        index: of the text.
        may_ban: a row may hold nothing but -inf.

    Raises:
        FloatingPointError: with the first place.
    """
    best: Any = logits.amax(-1)
    healthy = ~(best.isnan() | (best == float("inf")))
    if not may_ban:
        healthy = healthy & best.isfinite()
    if not bool(healthy.all()):
        place = int((~healthy).nonzero()[0])
        raise FloatingPointError(
            f"text {index}, new token {place + 1}: the {name}'s logits are NaN or infinite; check "
            "the weights, or load with dtype float32 or bfloat16"
        )
