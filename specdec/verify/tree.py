"""The shape of draft trees: ancestors, masks, static choices, best-first growth.

`parents` is topological [B, N] as in `Draft`: -1 marks a child of the root. Padding also carries -1
and therefore looks like a child of the root: mask it with the draft's lengths where it matters.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """List every node's ancestors, itself first: [B, N, depth], -1 above the root's children.

    Args:
        parents: [B, N] int64, topological, -1 for a child of the root.
        depth: at least the depth of the tree.
    """
    batch_size, num_nodes = parents.shape
    # Row 0 stands for the root and is its own parent, so that a finished climb stays there.
    above = pad(parents + 1, (1, 0))  # [B, N + 1]
    row = torch.arange(1, num_nodes + 1, device=parents.device).expand(batch_size, -1)
    climb = [row]
    for _ in range(depth - 1):
        row = above.gather(1, row)
        climb.append(row)
    return torch.stack(climb[:depth], dim=2) - 1 if depth else parents.new_empty(*parents.shape, 0)


def node_depths(parents: Tensor, depth: int) -> Tensor:
    """Count the nodes from the root to each node, itself included: [B, N]; the root is at 0."""
    return (ancestors(parents, depth) >= 0).sum(2)


def node_paths(parents: Tensor, depth: int) -> Tensor:
    """List the path to each node from the root's child down to itself: [B, N, depth], -1 padded."""
    upward = ancestors(parents, depth)
    step = torch.arange(depth, device=parents.device)
    position = (upward >= 0).sum(2, keepdim=True) - 1 - step  # [B, N, depth]
    return upward.gather(2, position.clamp(min=0)).masked_fill(position < 0, -1)


def path_tokens(tokens: Tensor, parents: Tensor, depth: int) -> Tensor:
    """List the tokens along the path to every node, its own last: [B, N, depth], -1 padded."""
    paths = node_paths(parents, depth)
    shared = tokens.unsqueeze(1).expand(-1, tokens.shape[1], -1)  # [B, N, N]
    return shared.gather(2, paths.clamp(min=0)).masked_fill(paths < 0, -1)


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """Mark which nodes each node may attend to: bool [B, N, N], [b, i, j] true for j = i or above.

    The target adds the committed prefix and the root, which every node sees.
    """
    batch_size, num_nodes = parents.shape
    rows = ancestors(parents, depth) + 1  # [B, N, depth], 0 = root
    mask = rows.new_zeros(batch_size, num_nodes, num_nodes + 1, dtype=torch.bool)
    return mask.scatter_(2, rows, True)[:, :, 1:]


@dataclass(frozen=True, eq=False)
class StaticTree:
    """A tree whose shape is fixed before any token is seen.

    Attributes:
        parents: [N] int64, topological, -1 for a child of the root.
        ranks: [N] int64, the rank of each node's token among its parent's candidates, 0 the best.
        depths: [N] int64, 1 for a child of the root.
        depth: the longest path.
    """

    parents: Tensor
    ranks: Tensor
    depths: Tensor
    depth: int


def from_choices(
    choices: Iterable[Sequence[int]], device: torch.device | str | None = None
) -> StaticTree:
    """Build a tree from the lists of ranks that Medusa and EAGLE publish.

    Args:
        choices: one entry per node: the rank chosen at every level, as `(0,), (1,), (0, 0)`. The
            order is free; the result is sorted by level, then by ranks.

    Raises:
        ValueError: an entry is empty, negative, given twice, or its parent is missing.
    """
    paths = sorted(map(tuple, choices), key=lambda path: (len(path), path))
    index = {path: i for i, path in enumerate(paths)}
    if len(index) != len(paths):
        raise ValueError("choices names a node twice; give every node once")
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"choices has {path}: a node is a non-empty tuple of ranks >= 0")
        if len(path) > 1 and path[:-1] not in index:
            raise ValueError(f"choices has {path} but not its parent {path[:-1]}; add the parent")
    columns = [(index.get(path[:-1], -1), path[-1], len(path)) for path in paths]
    tensor = torch.tensor(columns, dtype=torch.long, device=device).view(-1, 3)
    parents, ranks, depths = tensor.T.contiguous()
    return StaticTree(parents, ranks, depths, len(paths[-1]) if paths else 0)


def best_static_tree(
    acceptance: Sequence[Sequence[float]], num_nodes: int
) -> list[tuple[int, ...]]:
    """Choose the tree with the highest expected accepted length, as choices for `from_choices`.

    A node is worth the product of the acceptances along its path, if depths are independent of
    each other; the expected accepted length is the sum over the nodes.

    Args:
        acceptance: `[depth][rank]` probability that the target takes the candidate of this rank,
            given that it took the path above; measured on calibration prompts.
        num_nodes: nodes to choose, at least 1; fewer come back where the table holds fewer.

    Raises:
        ValueError: an acceptance outside [0, 1], an empty table, or no nodes to choose.

    Source: Medusa, arXiv 2401.10774, section 2.3.3.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes is {num_nodes} but must be at least 1")
    if not acceptance or not acceptance[0]:
        raise ValueError("acceptance is empty but needs at least one depth with one rank")
    for depth, row in enumerate(acceptance):
        if wrong := [value for value in row if not 0 <= value <= 1]:
            raise ValueError(f"acceptance[{depth}] holds {wrong[0]} but must be within [0, 1]")
    # (minus the worth, path): a child is never worth more than its parent, so parents come first.
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) <= num_nodes:  # the root is the first
        worth, path = heapq.heappop(heap)
        chosen.append(path)
        if len(path) < len(acceptance):
            for rank, value in enumerate(acceptance[len(path)]):
                heapq.heappush(heap, (worth * value, (*path, rank)))
    return chosen[1:]


def delayed_tree(stem: int, branches: int, depth: int) -> list[tuple[int, ...]]:
    """Make a chain that divides into several below its stem, as choices for `from_choices`.

    With children drawn with replacement the branches are independent draws of what may follow the
    stem.

    Args:
        stem: levels of the one chain, 0 for branches from the root on.
        branches: chains below it.
        depth: levels in all, those of the stem included.

    Raises:
        ValueError: a number is no int or too small.

    Source: arXiv 2602.16994 (delayed expansion).
    """
    for name, value, least in (("stem", stem, 0), ("branches", branches, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r} but must be an int of at least {least}")
    if not isinstance(depth, int) or depth <= stem:
        raise ValueError(f"depth is {depth!r} but must be an int above the stem of {stem} levels")
    top = (0,) * stem
    below = product(range(branches), range(depth - stem))
    tails = [(*top, branch, *(0,) * level) for branch, level in below]
    return [top[:level] for level in range(1, stem + 1)] + tails


@dataclass(frozen=True, eq=False)
class Selection:
    """The nodes that `best_first` kept, in pool order, which is topological.

    Attributes:
        nodes: [B, K] int64 pool indices, ascending, -1 padded.
        parents: [B, K] int64 parents as indices into `nodes`, -1 for a child of the root.
        lengths: [B] int64 nodes kept in each row.
    """

    nodes: Tensor
    parents: Tensor
    lengths: Tensor


def best_first(
    scores: Tensor, parents: Tensor, budget: int, row_budgets: Tensor | None = None
) -> Selection:
    """Keep the `budget` best nodes of a pool of candidates as a connected tree.

    Deterministic candidates only: a sampled tree may not be pruned after its tokens are seen.

    Args:
        scores: [B, M] cumulative log-probabilities: a child's is never above its parent's. -inf
            marks an entry that is no candidate.
        parents: [B, M] pool indices, topological, -1 for a child of the root.
        budget: nodes to keep; K = min(budget, M).
        row_budgets: [B] smaller budgets of single rows.

    Source: EAGLE-2, arXiv 2406.16858 (expand by beams, then rerank the whole pool).
    """
    num_candidates = scores.shape[1]
    width = min(budget, num_candidates)
    # A stable sort puts a parent before a child of equal score, because its index is smaller. So
    # the kept set is connected also under exact ties, which top-k does not promise.
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    kept = ranked[:, :width] > float("-inf")
    if row_budgets is not None:
        ranks = torch.arange(width, device=scores.device)
        kept = kept & (ranks < row_budgets.unsqueeze(1))
    nodes = order[:, :width].masked_fill(~kept, num_candidates).sort(dim=1).values
    lengths = kept.sum(1)

    positions = torch.arange(width, device=scores.device).expand_as(nodes)
    # Column 0 is the root; the last one takes the padding's writes and is never read.
    renamed = parents.new_full((parents.shape[0], num_candidates + 2), -1)
    renamed = renamed.scatter(1, nodes + 1, positions)
    real = nodes < num_candidates
    above = pad(parents, (0, 1), value=-1).gather(1, nodes)  # [B, K]
    kept_parents = renamed.gather(1, above + 1).masked_fill(~real, -1)
    return Selection(nodes.masked_fill(~real, -1), kept_parents, lengths)
