"""Block verification: judge a chain as a whole, deepest prefix first.

Source: Sun et al., arXiv 2403.10444, Algorithm 2.
"""

import torch
from torch import Tensor

from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import chain_path, emit, plain
from specdec.verify.residual import ANY_UNIFORM, draw, select_row, token_probs, work_dtype
from specdec.verify.token import chain_residual


def judge_block(
    target_probs: Tensor, draft: Draft, uniforms: Tensor | None, noise: Tensor | None
) -> Verdict:
    """Accept the longest prefix that the draft, taken as a block, still allows.

    On average at least as many tokens as the token rule, and lossless alike. With deterministic
    drafts (`probs` None) both accept equally many in expectation. `draft.parents` are taken to
    spell a chain; branching is refused under checks.

    `tested` marks every real node: uniforms are compared from the deepest node up, and the nodes
    above an accepted one are on its path.
    """
    if draft.num_nodes == 0 or draft.depth == 0:
        return plain(draft, draw(target_probs[:, 0].to(work_dtype(target_probs)), noise))
    real = draft.real_nodes()
    reach, final = _acceptance(target_probs, draft, real)
    accepted = real & ((ANY_UNIFORM if uniforms is None else uniforms) < final)
    steps = torch.arange(1, draft.num_nodes + 1, device=real.device)
    num_accepted = (accepted * steps).amax(1)
    row = select_row(target_probs, num_accepted)
    scale = torch.nn.functional.pad(reach, (1, 0), value=1.0).gather(1, num_accepted.unsqueeze(1))
    last = draw(chain_residual(row, draft, num_accepted, scale), noise)
    return emit(draft, chain_path(num_accepted, draft.depth), num_accepted, last, real)


def _acceptance(target_probs: Tensor, draft: Draft, real: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a_i before and after the rest of the chain was rejected: two [B, N]."""
    tokens = draft.tokens.masked_fill(~real, 0)
    rows = torch.arange(draft.num_nodes, device=real.device).expand_as(tokens)
    target_mass = token_probs(target_probs, rows, tokens)
    ratio = target_mass
    if draft.probs is not None:
        ratio = ratio / draft.probs.gather(2, tokens.unsqueeze(2)).squeeze(2)
    reach = [ratio[:, 0].clamp(max=1)]
    for node in range(1, draft.num_nodes):
        reach.append((reach[-1] * ratio[:, node]).clamp(max=1))
    stacked = torch.stack(reach, 1)  # [B, N]

    inner = stacked[:, :-1]
    if draft.probs is None:
        left = inner * (1 - target_mass[:, 1:])  # the sum of [a P - one-hot]+, as a <= 1
    else:
        scaled = inner.unsqueeze(2) * target_probs[:, 1:-1]
        left = (scaled - draft.probs[:, 1:]).clamp_(min=0).sum(2)
    final = torch.where(real[:, 1:], keep_probability(left, inner), inner)
    return stacked, torch.cat((final, stacked[:, -1:]), 1)


def keep_probability(left: Tensor, reach: Tensor) -> Tensor:
    """Update a node's acceptance probability after all its children were rejected.

    Args:
        left: S, the mass of [a P - Q]+.
        reach: a, the probability before.

    Returns:
        S / (S + (1 - a)). In this order, because a = 1 must give exactly 1, or the largest uniform
        rejects what may not be rejected. Nothing over nothing is 1: the target row is the fallback.
    """
    total = left + (1 - reach)
    return torch.where(total > 0, left / total, 1.0)
