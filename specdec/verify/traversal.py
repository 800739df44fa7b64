"""Block and traversal verification: judge a chain or a tree as a whole, the deepest nodes first.

Sources: Sun et al., arXiv 2403.10444, Algorithm 2 (block); Weng et al., arXiv 2505.12398,
Algorithm 2 (traversal).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import chain_path, emit, follow
from specdec.verify.residual import draw, has_mass, select_row, strike, work_dtype
from specdec.verify.token import chain_ratio, chain_residual, point_masses
from specdec.verify.tree import ancestor_mask


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


def judge_block(target_probs: Tensor, draft: Draft, uniforms: Tensor, noise: Tensor) -> Verdict:
    """Accept the longest prefix that the draft, taken as a block, still allows.

    On average at least as many tokens as the token rule, and lossless alike. With deterministic
    drafts (`probs` None) both accept equally many in expectation. `draft.parents` are taken to
    spell a chain; branching is refused under checks.

    `tested` marks every real node: uniforms are compared from the deepest node up, and the nodes
    above an accepted one are on its path.
    """
    real = draft.real_nodes()
    steps = torch.arange(draft.num_nodes, device=real.device)
    ratio = chain_ratio(target_probs, draft, real, steps)
    reach = [ratio[:, 0].clamp(max=1)]
    for node in range(1, draft.num_nodes):
        reach.append((reach[-1] * ratio[:, node]).clamp(max=1))
    before = torch.stack(reach, 1)  # [B, N] a of every node before the rest was rejected

    inner = before[:, :-1]
    if draft.probs is None:
        left = inner * (1 - ratio[:, 1:])  # the sum of [a P - one-hot]+, as a <= 1
    else:
        scaled = inner.unsqueeze(2) * target_probs[:, 1:-1]
        left = (scaled - draft.probs[:, 1:]).clamp_(min=0).sum(2)
    after = torch.where(real[:, 1:], keep_probability(left, inner), inner)
    accepted = real & (uniforms < torch.cat((after, before[:, -1:]), 1))

    num_accepted = (accepted * (steps + 1)).amax(1)
    scale = pad(before, (1, 0), value=1.0).gather(1, num_accepted.unsqueeze(1))
    row = select_row(target_probs, num_accepted)
    last = draw(chain_residual(row, draft, num_accepted, scale), noise)
    return emit(draft, chain_path(num_accepted, draft.depth), num_accepted, last, real)


def judge_traversal(target_probs: Tensor, draft: Draft, uniforms: Tensor, noise: Tensor) -> Verdict:
    """Accept the first node, children before parents and siblings in order, with u < its final a.

    Lossless. On a chain it is block verification. On balanced trees it accepts more than the token
    rule on average, but not always: it can lose where a later sibling carries the deeper subtree.
    With deterministic drafts (`probs` None) both accept equally many in expectation.

    `tested` marks the nodes whose uniform was compared, up to the accepted one, and its path.
    """
    if draft.parents is None:
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
    accepted = real & (uniforms < final)

    above = ancestor_mask(parents, draft.depth)  # [b, i, j]: j is i or above it
    holds_accepted = (above & accepted.unsqueeze(2)).any(1)
    path, last_row, beside = follow(holds_accepted, parents, draft.depth)
    on_path = torch.zeros_like(pad(beside, (0, 1)))
    on_path = on_path.scatter(1, path % (draft.num_nodes + 1), True)[:, :-1]
    # Compared are the path and every subtree that hangs off it before the accepted node.
    rejected = beside & ~on_path
    tested = on_path | (above & rejected.unsqueeze(1)).any(2)

    row = select_row(target_probs, last_row)
    if weights is None:
        row = strike(row, tokens, real & (parents + 1 == last_row.unsqueeze(1)))
    else:
        left = select_row(weights, last_row)
        row = torch.where(has_mass(left), left, row)
    return emit(draft, path, (path >= 0).sum(1), draw(row, noise), real & tested)


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
        left = torch.where(updated.unsqueeze(1), left / total.unsqueeze(1), parent_weights)
        weights[batch, row] = left
        reach[batch, row] = torch.where(updated, mass / total, parent_reach)
    return reach[:, 1:], weights
