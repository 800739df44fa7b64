"""Traversal verification: judge a tree bottom-up, leaves before their parents.

Source: Weng et al., arXiv 2505.12398, Algorithm 2.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.block import judge_block, keep_probability
from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import emit, follow
from specdec.verify.residual import (
    ANY_UNIFORM,
    draw,
    has_mass,
    select_row,
    strike,
    work_dtype,
)
from specdec.verify.token import point_masses
from specdec.verify.tree import ancestor_mask


def judge_traversal(
    target_probs: Tensor, draft: Draft, uniforms: Tensor | None, noise: Tensor | None
) -> Verdict:
    """Accept the first node, children before parents and siblings in order, with u < its final a.

    Lossless. On a chain it is block verification. On balanced trees it accepts more than the token
    rule on average, but not always: it can lose where a later sibling carries the deeper subtree.
    With deterministic drafts (`probs` None) both accept equally many in expectation.

    `tested` marks the nodes whose uniform was compared, up to the accepted one, and its path.
    """
    if draft.parents is None or draft.num_nodes == 0 or draft.depth == 0:
        return judge_block(target_probs, draft, uniforms, noise)
    real = draft.real_nodes()
    tokens = draft.tokens.masked_fill(~real, 0)
    parents = draft.parents.masked_fill(~real, -1)
    # All a are what they are once everything judged before was rejected, so none depends on a
    # uniform: they are computed for all nodes first and compared afterwards.
    weights = None
    if draft.probs is None:
        final = _point_mass_acceptance(target_probs, tokens, parents, real, draft.depth)
    else:
        final, weights = _sampled_acceptance(target_probs, draft.probs, tokens, parents, real)
    accepted = real & ((ANY_UNIFORM if uniforms is None else uniforms) < final)

    above = ancestor_mask(parents, draft.depth)  # [b, i, j]: j is i or above it
    holds_accepted = (above & accepted.unsqueeze(2)).any(1)
    path, last_row, beside = follow(holds_accepted, parents, draft.depth)
    tested = real & _compared(path, beside, above)

    row = select_row(target_probs, last_row)
    if weights is None:
        row = strike(row, tokens, real & (parents + 1 == last_row.unsqueeze(1)))
    else:
        left = select_row(weights, last_row)
        row = torch.where(has_mass(left), left, row)
    return emit(draft, path, (path >= 0).sum(1), draw(row, noise), tested)


def _compared(path: Tensor, beside: Tensor, above: Tensor) -> Tensor:
    """Mark the path and every subtree that hangs off it before the accepted node, [B, N].

    Args:
        path: [B, D] accepted nodes.
        beside: [B, N] children of path nodes up to the path's own child, from `follow`.
        above: [B, N, N] from `ancestor_mask`.
    """
    num_nodes = beside.shape[1]
    on_path = torch.zeros_like(pad(beside, (0, 1)))
    on_path = on_path.scatter(1, path % (num_nodes + 1), True)[:, :num_nodes]
    hanging = beside & ~on_path  # roots of the rejected subtrees
    return on_path | (above & hanging.unsqueeze(1)).any(2)


def _point_mass_acceptance(
    target_probs: Tensor, tokens: Tensor, parents: Tensor, real: Tensor, depth: int
) -> Tensor:
    """Compute the final a of deterministic nodes in closed form, [B, N].

    Rejecting children of total mass w leaves a node with a (1 - w) / (1 - a w), and the next child
    x starts at a P(x) / (1 - a w): the update rule, unrolled.
    """
    mass, before = point_masses(target_probs, tokens, parents, real)
    tiny = torch.finfo(mass.dtype).tiny
    rows = parents + 1
    reach = torch.ones_like(mass)
    for _ in range(depth):  # after d rounds the nodes of depth d are right
        parent_reach = pad(reach, (1, 0), value=1.0).gather(1, rows)
        left = (1 - parent_reach * before).clamp(min=tiny)
        reach = (parent_reach * mass / left).clamp(max=1)
    children = torch.zeros_like(pad(mass, (1, 0))).scatter_add(1, rows, mass)[:, 1:]
    return keep_probability(reach * (1 - children).clamp(min=0), reach)


def _sampled_acceptance(
    target_probs: Tensor, draft_probs: Tensor, tokens: Tensor, parents: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the final a [B, N] of sampled nodes, and every row's a P [B, N + 1, V] after that.

    Node order meets a node after its parent and its earlier siblings, so one pass over the columns
    suffices. Rows hold a P, not P: the update [a P - Q]+ / (S + (1 - a)) then needs no S above it.
    """
    dtype = work_dtype(target_probs)
    weights = target_probs.to(dtype, copy=True)
    batch = torch.arange(tokens.shape[0], device=tokens.device)
    reach = torch.ones_like(weights[:, :, 0])  # [B, N + 1]
    for node in range(tokens.shape[1]):
        row = parents[:, node] + 1
        parent_weights, parent_reach = weights[batch, row], reach[batch, row]
        draft_row = draft_probs[:, node].to(dtype)
        token = tokens[:, node : node + 1]
        ratio = (parent_weights.gather(1, token) / draft_row.gather(1, token)).clamp(max=1)
        reach[:, node + 1] = ratio.squeeze(1)
        weights[:, node + 1] *= ratio

        left = (parent_weights - draft_row).clamp(min=0)
        mass = left.sum(1)
        total = mass + (1 - parent_reach)
        # A row with nothing left, and nothing to reject it, keeps its state: the fallback.
        updated = real[:, node] & (total > 0)
        weights[batch, row] = torch.where(
            updated.unsqueeze(1), left / total.unsqueeze(1), parent_weights
        )
        reach[batch, row] = torch.where(updated, mass / total, parent_reach)
    return reach[:, 1:], weights
