"""Typical acceptance: keep what is plausible enough. Lossy.

Source: Medusa, arXiv 2401.10774, section 2.3.1.
"""

import torch
from torch import Tensor

from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import emit, plain
from specdec.verify.residual import draw, select_row, token_probs, work_dtype
from specdec.verify.tree import node_depths, node_paths


def judge_typical(
    target_probs: Tensor,
    draft: Draft,
    uniforms: Tensor | None,
    noise: Tensor | None,
    *,
    epsilon: float,
    alpha: float,
) -> Verdict:
    """Accept x where P(x) > min(epsilon, alpha exp(-entropy(P))), then follow the longest path.

    Among the longest paths the likeliest wins. `uniforms` are not used, only the last token is
    drawn, from the target itself. `tested` marks every real node.
    """
    if draft.num_nodes == 0 or draft.depth == 0:
        return plain(draft, draw(target_probs[:, 0].to(work_dtype(target_probs)), noise))
    real = draft.real_nodes()
    tokens = draft.tokens.masked_fill(~real, 0)
    parents = draft.explicit_parents()
    own = token_probs(target_probs, parents + 1, tokens)
    accepted = real & (own > _thresholds(target_probs, epsilon, alpha).gather(1, parents + 1))

    paths = node_paths(parents, draft.depth)  # [B, N, D]
    on_path = paths >= 0
    steps = paths.clamp(min=0).flatten(1)  # [B, N * D]
    kept = (accepted.gather(1, steps).view_as(paths) | ~on_path).all(2)
    likelihood = own.log().gather(1, steps).view_as(paths).masked_fill(~on_path, 0).sum(2)

    length = node_depths(parents, draft.depth).masked_fill(~kept, 0)
    num_accepted = length.amax(1)
    longest = kept & (length == num_accepted.unsqueeze(1))
    best = likelihood.masked_fill(~longest, float("-inf")).argmax(1)  # any node where none is kept
    batch = torch.arange(best.shape[0], device=best.device)
    is_kept = (num_accepted > 0).unsqueeze(1)
    path = paths[batch, best].masked_fill(~is_kept, -1)
    last_row = path.amax(1) + 1
    last = draw(select_row(target_probs, last_row), noise)
    return emit(draft, path, num_accepted, last, real)


def _thresholds(target_probs: Tensor, epsilon: float, alpha: float) -> Tensor:
    """Compute min(epsilon, alpha exp(-entropy)) of every target row, [B, N + 1]."""
    probs = target_probs.to(work_dtype(target_probs))
    entropy = torch.special.entr(probs).sum(2)
    return (alpha * torch.exp(-entropy)).clamp(max=epsilon)
