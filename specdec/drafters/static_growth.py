"""Growing a draft tree of a shape that is fixed beforehand, from chosen or sampled children.

Sampled children make the shape's fixedness essential: a tree that is pruned after its tokens are
seen is no longer drawn from the q it reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.randomness import row_exponentials
from specdec.sampling import Sampler, sample, sample_without_replacement
from specdec.verify import Draft
from specdec.verify.tree import StaticTree

CHILDREN = ("top", "without_replacement", "with_replacement")
# Level i of a sampled tree draws from stream 64 + i of its row's randomness.
FIRST_STREAM = 64


class StaticGrowth:
    """Fills a `StaticTree` with tokens, level by level.

    Args:
        plan: of the shape, see `plan_levels`.
        children: "top" takes each node's likeliest children, which is a point mass; the others
            sample them from the processed distribution and report its q.
        budget: the largest of the rows' budgets, at least 1; levels behind it are left out.
        sampler: of the batch; turns scores into the distribution that is sampled.
        counters: [B] int64 committed tokens, the counter of the rows' randomness.
    """

    def __init__(
        self,
        plan: "StaticPlan",
        children: str,
        budget: int,
        sampler: Sampler,
        counters: Tensor,
    ) -> None:
        self._tree, self._plan, self._plan_is_chain = plan.tree, plan.levels, plan.is_chain
        self.num_levels = plan.num_levels(budget)
        # At temperature 0 a distribution holds one token, and a sampled tree one path.
        self._children = "top" if sampler.is_greedy else children
        self._sampler, self._counters = sampler, counters
        self._level = 0
        self._tokens: list[Tensor] = []
        self._probs: list[Tensor] = []
        self._alive: list[Tensor] = []
        self._confidence: list[Tensor] = []  # logs, of chosen children only
        self.origin = torch.empty(0)  # [B, beam] parents of the newest beam in the beam before

    @property
    def is_done(self) -> bool:
        """Whether every level has its tokens."""
        return self._level == self.num_levels

    def add_level(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """Choose the next level's tokens from the processed scores [B, beam, V] of the newest beam.

        `ids` [V] names the tokens that the columns stand for, None if they are token ids.
        """
        level = self._plan[self._level]
        if self._children == "top":
            chosen = self._choose(scores, ids, level)
        else:
            chosen = self._sample(scores, level)
            self._alive.append(chosen >= 0)
        self._tokens.append(chosen)  # [B, nodes of this level]
        self._level += 1
        self.origin = level.origin.expand(len(chosen), -1)

    def _choose(self, scores: Tensor, ids: Tensor | None, level: "_Level") -> Tensor:
        """Take every node's likeliest children, and note how likely they are."""
        # In half precision a log-sum would be off by percents, and confidences are multiplied.
        total = scores.float().logsumexp(-1, keepdim=True)
        if level.is_single:
            best, chosen = scores[:, 0].max(-1, keepdim=True)
            share = best.float() - total[:, 0]
        else:
            top = scores.topk(min(level.num_children, scores.shape[-1]), -1)
            chosen = top.indices[:, level.parent_places, level.ranks]
            share = (top.values.float() - total)[:, level.parent_places, level.ranks]
        if self._confidence:
            share = share + self._confidence[-1][:, level.parents_before]
        self._confidence.append(share)
        return chosen if ids is None else ids[chosen]

    def _sample(self, scores: Tensor, level: "_Level") -> Tensor:
        """Draw every node's children, -1 where nothing is left, and keep their q."""
        # Where the sampling settings ban all that the head can say, its law is empty, not NaN.
        probs = self._sampler.probs(scores).nan_to_num(0.0)  # [B, beam, V]
        batch, beam, vocab = probs.shape
        k, stream = level.num_children, FIRST_STREAM + self._level
        seeds = self._sampler.seeds
        if self._children == "with_replacement":
            noise = row_exponentials(seeds, self._counters, stream, beam * k * vocab)
            drawn = sample(probs.unsqueeze(2), noise.view(batch, beam, k, vocab))
            drawn = drawn.masked_fill(probs.sum(-1, keepdim=True) == 0, -1)
            laws = probs.unsqueeze(2).expand(-1, -1, k, -1)
        else:
            noise = row_exponentials(seeds, self._counters, stream, beam * vocab)
            drawn = sample_without_replacement(probs, noise.view_as(probs), k)
            laws = _without_earlier(probs, drawn)
        self._probs.append(laws[:, level.parent_places, level.ranks])
        return drawn[:, level.parent_places, level.ranks]

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes of the newest level that have children; see `CandidatePool.newest`."""
        level = self._plan[self._level - 1]
        tokens = self._tokens[-1][:, level.expanded].clamp(min=0)
        visible = level.visible.expand(len(tokens), -1, -1)
        return tokens, visible, level.fed_levels

    def expanded(self) -> tuple[Draft, Tensor]:
        """All nodes so far as a draft, and the rows [beam] of the newest beam in its logits."""
        tokens = torch.cat(self._tokens, 1)
        count = tokens.shape[1]
        level = self._plan[self._level - 1]
        rows = count - self._tokens[-1].shape[1] + 1 + level.expanded
        return Draft.tree(tokens, self._tree.parents[:count], depth=self._level), rows

    def draft(self, budget: Sequence[int]) -> Draft:
        """The finished tree, or chain; a row's budget keeps its first nodes."""
        row_budgets = torch.tensor(budget, device=self._tokens[0].device)
        tokens = _first(self._tokens, max(budget))
        num_nodes = tokens.shape[1]
        real = torch.arange(num_nodes, device=tokens.device) < row_budgets.unsqueeze(1)
        probs = _first(self._probs, num_nodes) if self._probs else None
        confidence = None
        if self._confidence:
            confidence = _first(self._confidence, num_nodes).exp().nan_to_num(0.0)
        # A sampled tree cut down to a path stays a tree: its nodes may have run out of tokens.
        if num_nodes == self._level and (self._plan_is_chain or probs is None):
            return Draft.chain(tokens.masked_fill(~real, -1), real.sum(1), probs, confidence)
        parents = self._tree.parents[:num_nodes]
        if probs is not None:
            alive = real & self._reachable(_first(self._alive, num_nodes))
            return _compact(tokens, parents, probs, alive, self._level)
        return Draft.tree(
            tokens.masked_fill(~real, -1),
            parents.masked_fill(~real, -1),
            real.sum(1),
            self._level,
            confidence=confidence,
        )

    def _reachable(self, alive: Tensor) -> Tensor:
        """Nodes whose whole path was drawn: where a law ran out of tokens, nothing hangs below.

        That is decided by the law's support, before a token is seen, so it biases nothing.
        """
        above = torch.nn.functional.pad(alive, (1, 0), value=True)  # [B, N + 1], column 0 the root
        for _ in range(self._level - 1):
            above[:, 1:] &= above[:, self._tree.parents[: alive.shape[1]] + 1]
        return above[:, 1:]


class _Level:
    """What one level of a static tree needs, as index tensors."""

    parent_places: Tensor  # [nodes] places of their parents in the beam before
    parents_before: Tensor  # [nodes] places of their parents in the level before
    ranks: Tensor  # [nodes]
    num_children: int  # most children of any node of the beam before
    is_single: bool  # one node, as in a chain
    expanded: Tensor  # [beam] places of the nodes with children, within this level
    origin: Tensor  # [beam] places of their parents in the beam before
    visible: Tensor  # [beam, fed so far]
    fed_levels: Tensor  # [fed so far]


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """A static tree and the indices of its levels, worked out once for all steps."""

    tree: StaticTree
    levels: list[_Level]
    depths: list[int]  # of the nodes, on the host

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree."""
        return len(self.tree.parents)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return self.num_nodes == self.tree.depth

    def num_levels(self, budget: int) -> int:
        """Levels that the first `budget` nodes reach, at least 1; nodes are sorted by level."""
        return self.depths[min(budget, self.num_nodes) - 1]


def plan_levels(tree: StaticTree) -> StaticPlan:
    """Work out each level's indices; `StaticTree` sorts nodes by level, then by ranks."""
    device = tree.parents.device
    parents, ranks, depths = (x.tolist() for x in (tree.parents, tree.ranks, tree.depths))
    has_children = set(parents)
    levels: list[_Level] = []
    fed: list[int] = []  # nodes fed so far, in order
    beam_before, nodes_before = [-1], [-1]
    for depth in range(1, tree.depth + 1):
        nodes = [node for node, at in enumerate(depths) if at == depth]
        beam = [node for node in nodes if node in has_children]
        fed += beam
        level = _Level()
        level.parent_places = _index([beam_before.index(parents[n]) for n in nodes], device)
        level.parents_before = _index([nodes_before.index(parents[n]) for n in nodes], device)
        level.ranks = _index([ranks[n] for n in nodes], device)
        level.num_children = max(ranks[n] for n in nodes) + 1
        level.is_single = level.num_children == len(beam_before) == 1
        level.expanded = _index([nodes.index(n) for n in beam], device)
        level.origin = _index([beam_before.index(parents[n]) for n in beam], device)
        paths = [_path(node, parents) for node in beam]
        seen = [[other in path for other in fed] for path in paths]
        level.visible = torch.tensor(seen, dtype=torch.bool, device=device)
        level.fed_levels = _index([depths[node] - 1 for node in fed], device)
        levels.append(level)
        beam_before, nodes_before = beam, nodes
    return StaticPlan(tree, levels, depths)


def _first(levels: list[Tensor], count: int) -> Tensor:
    """The first nodes of all levels together."""
    return torch.cat(levels, 1)[:, :count]


def _index(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _path(node: int, parents: list[int]) -> set[int]:
    path = set()
    while node >= 0:
        path.add(node)
        node = parents[node]
    return path


def _without_earlier(probs: Tensor, drawn: Tensor) -> Tensor:
    """The law of each draw given the draws before it: [B, beam, k, V], normalised."""
    batch, beam, vocab = probs.shape
    k = drawn.shape[2]
    laws = torch.nn.functional.pad(probs, (0, 1)).unsqueeze(2).repeat(1, 1, k, 1)
    earlier = torch.ones(k, k, dtype=torch.bool, device=probs.device).tril(-1)
    # The column behind the vocabulary takes the writes that are not meant.
    index = torch.where(earlier & (drawn >= 0).unsqueeze(2), drawn.unsqueeze(2), vocab)
    laws = laws.scatter(3, index.expand(batch, beam, k, k), 0.0)[..., :vocab]
    return laws / laws.sum(-1, keepdim=True).clamp(min=torch.finfo(laws.dtype).tiny)


def _compact(tokens: Tensor, parents: Tensor, probs: Tensor, alive: Tensor, depth: int) -> Draft:
    """Close the gaps of nodes that are not alive; order and parents are kept."""
    order = (~alive).to(torch.uint8).sort(dim=1, stable=True).indices  # [B, N] alive ones first
    places = alive.cumsum(1) - 1
    lengths = alive.sum(1)
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    above = torch.nn.functional.pad(places, (1, 0), value=-1)  # [B, N + 1], column 0 the root
    renamed = above.gather(1, (parents + 1).expand(tokens.shape)).gather(1, order)
    return Draft.tree(
        tokens.gather(1, order).masked_fill(~real, -1),
        renamed.masked_fill(~real, -1),
        lengths,
        depth,
        probs.gather(1, order.unsqueeze(2).expand_as(probs)),
    )
