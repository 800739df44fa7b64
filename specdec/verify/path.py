"""From accepted nodes to a `Verdict`: which path a rule follows, and matching, which is only that.

Inside, a *row* is an index into the target's N + 1 rows: 0 is the root, i + 1 is node i.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify.draft import Draft, Verdict


def emit(draft: Draft, path: Tensor, num_accepted: Tensor, last: Tensor, tested: Tensor) -> Verdict:
    """Assemble a verdict from the accepted `path` [B, D] and the `last` token [B]."""
    accepted = pad(draft.tokens, (0, 1), value=-1).gather(1, path % (draft.num_nodes + 1))
    tokens = pad(accepted, (0, 1), value=-1)  # [B, D + 1]
    tokens = tokens.scatter(1, num_accepted.unsqueeze(1), last.unsqueeze(1))
    return Verdict(tokens, num_accepted, path, tested)


def plain(draft: Draft, last: Tensor) -> Verdict:
    """Assemble the verdict of a draft without nodes: one token [B] a row."""
    path = draft.tokens.new_full((draft.batch_size, draft.depth), -1)
    tokens = pad(last.unsqueeze(1), (0, draft.depth), value=-1)
    return Verdict(tokens, torch.zeros_like(last), path, draft.real_nodes())


def choose(first: Tensor, one: Verdict, other: Verdict) -> Verdict:
    """Take rows of `one` verdict where `first` [B] holds, and of the `other` one elsewhere."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return Verdict(*(torch.where(first.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def with_bonus(verdict: Verdict, draft: Draft, bonus_tokens: Tensor) -> Verdict:
    """Put the engine's own tokens [B] behind the chains that were accepted whole."""
    end = verdict.num_accepted.unsqueeze(1)
    is_whole = verdict.num_accepted == draft.lengths
    last = torch.where(is_whole, bonus_tokens, verdict.tokens.gather(1, end).squeeze(1))
    return replace(verdict, tokens=verdict.tokens.scatter(1, end, last.unsqueeze(1)))


def chain_path(num_accepted: Tensor, depth: int) -> Tensor:
    """Spell the path of a chain's first `num_accepted` [B] nodes: [B, depth], -1 padded."""
    steps = torch.arange(depth, device=num_accepted.device)
    return torch.where(steps < num_accepted.unsqueeze(1), steps, -1)


def follow(accepted: Tensor, parents: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down from the root, always to the first accepted child.

    Args:
        accepted: [B, N] bool, false on padding.
        parents: [B, N] with -1 for the root's children.
        depth: steps to take, D.

    Returns:
        path [B, D] (-1 padded), the row it ends in [B], and `tested` [B, N]: nodes whose parent is
        on the path and which stand no later than the accepted child. Padding counts as tested.
    """
    batch_size, num_nodes = parents.shape
    end = num_nodes + 1
    rows = torch.arange(1, end, device=parents.device)  # [N], the row of each node
    above = parents + 1
    # child[row] is the first accepted child's row; `end` when there is none, also for `end` itself.
    child = rows.new_full((batch_size, end + 1), end)
    child = child.scatter_reduce(1, above, torch.where(accepted, rows, end), "amin")

    row = torch.zeros_like(above[:, :1])
    walk = []
    for _ in range(depth):
        row = child.gather(1, row)
        walk.append(row)
    visited = torch.cat(walk, 1)  # [B, D]
    live = visited % end  # 0 where the walk has ended

    on_path = pad(visited, (1, 0))  # the root is always on the path
    judged_up_to = torch.zeros_like(child).scatter(1, on_path, child.gather(1, on_path))
    tested = rows <= judged_up_to.gather(1, above)
    return live - 1, live.amax(1), tested


def match(sampled: Tensor, draft: Draft) -> Verdict:
    """Accept the draft tokens that equal the engine's own samples.

    Lossless for any draft: every emitted token is a sample of the target. Among siblings with the
    same token the first is followed; choosing the one that goes deeper would be biased.

    Args:
        sampled: [B, N + 1] int64, one draw of the target after the root (column 0) and after each
            node i (column i + 1). Columns past a row's length are not read.
        draft: its `probs` are ignored.

    Returns:
        A verdict with `tested` as in the token rule: the children of the path's nodes in order, up
        to the accepted one.

    Raises:
        ValueError: `sampled` has the wrong shape.
        TypeError: `sampled` is not an integer tensor.
    """
    if sampled.dtype.is_floating_point or sampled.dtype.is_complex:
        raise TypeError(f"sampled must hold token ids, got {sampled.dtype} (rule 'match')")
    needed = (draft.batch_size, draft.num_nodes + 1)
    if sampled.shape != needed:
        raise ValueError(
            f"sampled has shape {tuple(sampled.shape)} but rule 'match' needs {needed}"
        )
    if draft.parents is None:
        return _match_chain(sampled, draft)
    if draft.num_nodes == 0 or draft.depth == 0:
        return plain(draft, sampled[:, 0])
    real = draft.real_nodes()
    parents = draft.parents.masked_fill(~real, -1)
    accepted = (sampled.gather(1, parents + 1) == draft.tokens) & real
    path, last_row, tested = follow(accepted, parents, draft.depth)
    last = sampled.gather(1, last_row.unsqueeze(1)).squeeze(1)
    return emit(draft, path, (path >= 0).sum(1), last, tested & real)


def _match_chain(sampled: Tensor, draft: Draft) -> Verdict:
    # The hot path of greedy decoding: every operation here is paid once a step.
    num_nodes = draft.num_nodes
    steps = torch.arange(num_nodes + 1, device=sampled.device)
    real = steps[:num_nodes] < draft.lengths.unsqueeze(1)
    is_equal = sampled.narrow(1, 0, num_nodes) == draft.tokens
    num_accepted = (is_equal & real).cumprod(1).sum(1)
    reached = steps <= num_accepted.unsqueeze(1)  # [B, N + 1]
    tokens = torch.where(reached, sampled, -1)
    path = torch.where(reached[:, 1:], steps[:num_nodes], -1)
    if draft.depth != num_nodes:  # what is cut is padding: `depth` covers the longest path
        behind = (0, draft.depth - num_nodes)
        tokens, path = pad(tokens, behind, value=-1), pad(path, behind, value=-1)
    return Verdict(tokens, num_accepted, path, reached[:, :num_nodes] & real)
