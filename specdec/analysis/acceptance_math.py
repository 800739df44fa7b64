"""Acceptance of one drafted token, from two distributions and the token that came."""

import torch
from torch import Tensor

from specdec.sampling.sampler import Sampler

# Rows are compared in chunks, which bounds the memory of vocabularies.
CHUNK = 128


def compare(
    draft_logits: Tensor, target_logits: Tensor, tokens: Tensor, sampler: Sampler, num_siblings: int
) -> dict[str, Tensor]:
    """Facts of n places, on the CPU, under the names of the fields of `Evidence`."""
    chunks = zip(
        draft_logits.split(CHUNK), target_logits.split(CHUNK), tokens.split(CHUNK), strict=True
    )
    parts = [_compare(*chunk, sampler, num_siblings) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _compare(
    draft_logits: Tensor, target_logits: Tensor, tokens: Tensor, sampler: Sampler, num_siblings: int
) -> dict[str, Tensor]:
    column = tokens.unsqueeze(1)
    # The models' own distributions: temperature 1, unfiltered.
    q = draft_logits.float().softmax(-1).nan_to_num(0.0)
    p = target_logits.float().softmax(-1).nan_to_num(0.0)
    confidence, best_draft = q.max(-1)
    facts = {
        "rank": _ranks(draft_logits, column),
        "draft_prob": _at(q, column),
        "target_prob": _at(p, column),
        "confidence": confidence,
        "best_draft": best_draft,
        "best_target": target_logits.argmax(-1),
        "draft_entropy": torch.special.entr(q).sum(-1),
        "target_entropy": torch.special.entr(p).sum(-1),
    }
    # The distributions that are sampled; empty where the drafter can say nothing.
    q = sampler.probs(draft_logits.unsqueeze(0))[0].nan_to_num(0.0)
    q = q.masked_fill(~draft_logits.amax(-1, keepdim=True).isfinite(), 0.0)
    p = sampler.probs(target_logits.unsqueeze(0))[0]
    facts["possible"] = _at(p, column) > 0
    # Rounding may lift the overlap of two equal distributions above 1.
    facts["overlap"] = torch.minimum(p, q).sum(-1).clamp(max=1)
    facts["accept"] = sibling_acceptance(p, q, tokens, num_siblings)
    return facts


def _at(rows: Tensor, column: Tensor) -> Tensor:
    return rows.gather(1, column).squeeze(1)


def _ranks(logits: Tensor, column: Tensor) -> Tensor:
    """Number [n] of tokens before each row's own [n, 1], earlier ones first where logits tie.

    A token that cannot be said stands behind all of them, at V.
    """
    own = logits.gather(1, column)
    before = torch.arange(logits.shape[1], device=logits.device) < column
    rank = ((logits > own) | ((logits == own) & before)).sum(-1)
    return torch.where(own.squeeze(1) == float("-inf"), logits.shape[1], rank)


def sibling_acceptance(p: Tensor, q: Tensor, tokens: Tensor, num_siblings: int) -> Tensor:
    """Probability [n, num_siblings] that the j-th of siblings drawn from q is the one accepted.

    Given that the step emits the text's token x, over the draws and the uniforms of the token
    rule: with p_1 = p and p_{j+1} the normalized positive part of p_j - q, the j-th is accepted
    and is x with probability prod_{l<j} (1 - sum min(p_l, q)) min(p_j, q)(x). The residuals do not
    depend on what was drawn, because draws are with replacement.

    Source: Leviathan et al. 2022, arXiv 2211.17192; SpecInfer, arXiv 2305.09781.
    """
    column = tokens.unsqueeze(1)
    emitted = _at(p, column)
    weights, survival = p, torch.ones_like(emitted)
    accepted = []
    for _ in range(num_siblings):
        mass = weights.sum(-1, keepdim=True)
        residual = weights / mass.clamp(min=torch.finfo(weights.dtype).tiny)
        both = torch.minimum(residual, q)
        accepted.append(survival * _at(both, column))
        survival = survival * (1 - both.sum(-1)).clamp(min=0)
        weights = (residual - q).clamp(min=0)
    joint = torch.stack(accepted, 1)
    given = joint / emitted.clamp(min=torch.finfo(joint.dtype).tiny).unsqueeze(1)
    return given.masked_fill(emitted.unsqueeze(1) == 0, 0.0).clamp(max=1)


def refuse_not_finite(name: str, logits: Tensor, text: int, *, may_ban: bool = False) -> None:
    """Refuse NaN in logits [n, V] along a text; `may_ban` allows rows that are all -inf."""
    best = logits.amax(-1)
    healthy = ~(best.isnan() | (best == float("inf")))
    if not may_ban:
        healthy = healthy & best.isfinite()
    if not bool(healthy.all()):
        place = int((~healthy).nonzero()[0])
        raise FloatingPointError(
            f"text {text}, new token {place + 1}: the {name}'s logits are NaN or infinite; check "
            "the weights, or load with dtype float32 or bfloat16"
        )
