"""The token rule: judge one token at a time, siblings in order.

Sources: Leviathan et al., arXiv 2211.17192, and Chen et al., arXiv 2302.01318 (chains); SpecInfer,
arXiv 2305.09781 (siblings).
"""

import torch
from torch import Tensor

from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import chain_path, emit, follow
from specdec.verify.residual import draw, has_mass, select_row, strike, token_probs, work_dtype


def judge_token(target_probs: Tensor, draft: Draft, uniforms: Tensor, noise: Tensor) -> Verdict:
    """Accept each child x in order with probability min(1, p'(x) / q'(x)).

    A rejection turns p' into the normalized positive part of p' - q'; when no child survives, the
    corrected token is drawn from p'. `tested` marks exactly the children judged along the path.
    """
    if draft.parents is None:
        return _judge_chain(target_probs, draft, uniforms, noise)
    real = draft.real_nodes()
    tokens = draft.tokens.masked_fill(~real, 0)
    parents = draft.parents.masked_fill(~real, -1)
    weights = None
    if draft.probs is None:
        # Zeroing the earlier siblings and renormalizing is p(x) / (1 - their sum): no residual.
        mass, before = point_masses(target_probs, tokens, parents, real)
        accepted = uniforms < mass / (1 - before).clamp(min=torch.finfo(before.dtype).tiny)
    else:
        nodes = draft.probs, tokens, parents, real
        accepted, weights = _judge_sampled(target_probs, *nodes, uniforms)
    path, last_row, tested = follow(accepted, parents, draft.depth)
    row = select_row(target_probs, last_row)
    if weights is None:
        row = strike(row, tokens, (parents + 1 == last_row.unsqueeze(1)) & real)
    else:
        row = torch.where(has_mass(weights), weights, row)
    return emit(draft, path, (path >= 0).sum(1), draw(row, noise), tested & real)


def chain_ratio(target_probs: Tensor, draft: Draft, real: Tensor, steps: Tensor) -> Tensor:
    """Compute p(x) / q(x) of a chain's `real` [B, N] nodes, numbered by `steps` [N]: [B, N]."""
    tokens = draft.tokens.masked_fill(~real, 0)
    ratio = token_probs(target_probs, steps.expand_as(tokens), tokens)
    if draft.probs is None:
        return ratio
    return ratio / draft.probs.gather(2, tokens.unsqueeze(2)).squeeze(2)


def chain_residual(
    row: Tensor, draft: Draft, num_accepted: Tensor, scale: Tensor | float = 1.0
) -> Tensor:
    """Take the rejected node's draft distribution out of the target `row` [B, V].

    Rows that accepted everything have no rejected node and stay as they are. `scale` [B, 1]
    multiplies the others first. Where nothing would be left, the row stays as it is.
    """
    rejected = num_accepted.clamp(max=draft.num_nodes - 1)
    is_rejected = (num_accepted < draft.lengths).unsqueeze(1)
    if draft.probs is None:
        token = draft.tokens.gather(1, rejected.unsqueeze(1))
        return strike(row, token.masked_fill(~is_rejected, 0), is_rejected)
    left = (row * scale - select_row(draft.probs, rejected)).clamp(min=0)
    return torch.where(is_rejected & has_mass(left), left, row)


def _judge_chain(target_probs: Tensor, draft: Draft, uniforms: Tensor, noise: Tensor) -> Verdict:
    steps = torch.arange(draft.num_nodes, device=draft.tokens.device)
    real = steps < draft.lengths.unsqueeze(1)
    ratio = chain_ratio(target_probs, draft, real, steps)
    num_accepted = ((uniforms < ratio) & real).cumprod(1).sum(1)
    row = select_row(target_probs, num_accepted)
    last = draw(chain_residual(row, draft, num_accepted), noise)
    tested = (steps <= num_accepted.unsqueeze(1)) & real
    return emit(draft, chain_path(num_accepted, draft.depth), num_accepted, last, tested)


def point_masses(
    target_probs: Tensor, tokens: Tensor, parents: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Read what each deterministic node takes from its parent's row, and what went before it.

    Returns:
        mass [B, N], the target probability of the node's token, 0 for a token that an earlier
        sibling already took and for padding; and the sum of the earlier siblings' masses [B, N].
    """
    # [b, i, j] is true when sibling j is judged before i.
    before = (parents.unsqueeze(2) == parents.unsqueeze(1)).tril(-1)
    repeated = (before & (tokens.unsqueeze(2) == tokens.unsqueeze(1))).any(2)
    mass = token_probs(target_probs, parents + 1, tokens).masked_fill(repeated | ~real, 0)
    return mass, (before * mass.unsqueeze(1)).sum(2)


def _judge_sampled(
    target_probs: Tensor,
    draft_probs: Tensor,
    tokens: Tensor,
    parents: Tensor,
    real: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Judge siblings against residuals over the vocabulary: accepted [B, N], last residual [B, V].

    Node order is topological with siblings in order, so one pass over the N columns meets every
    node after its parent and its earlier siblings; elsewhere a row stands still.
    """
    dtype = work_dtype(target_probs)
    current = torch.zeros_like(tokens[:, 0])
    weights = target_probs[:, 0].to(dtype)  # p' times `mass`: rejections need no division
    mass = torch.ones_like(weights[:, :1])
    accepted_columns = []
    for node in range(tokens.shape[1]):
        token = tokens[:, node : node + 1]
        draft_row = draft_probs[:, node].to(dtype)
        ratio = weights.gather(1, token) / (mass * draft_row.gather(1, token))
        judged = real[:, node] & (parents[:, node] + 1 == current)
        accepted = judged & (uniforms[:, node] < ratio.squeeze(1))
        rejected = (judged & ~accepted).unsqueeze(1)
        left = (weights - mass * draft_row).clamp(min=0)
        weights = torch.where(rejected, left, weights)
        mass = torch.where(rejected, left.sum(1, keepdim=True), mass)
        weights = torch.where(accepted.unsqueeze(1), target_probs[:, node + 1].to(dtype), weights)
        mass = mass.masked_fill(accepted.unsqueeze(1), 1)
        current = torch.where(accepted, node + 1, current)
        accepted_columns.append(accepted)
    return torch.stack(accepted_columns, 1), weights
