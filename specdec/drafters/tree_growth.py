"""Growing a draft tree of a shape that is fixed beforehand, from chosen or sampled children.

Sampled children make the shape's fixedness essential: a tree that is pruned after its tokens are
seen is no longer drawn from the q it reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from specdec.common.arguments import require_counts
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample, sample_without_replacement
from specdec.verify import Draft, best_first
from specdec.verify.tree import StaticTree, best_static_tree, from_choices

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


class CandidatePool:
    """Every candidate seen while a tree grows, and the beam that is expanded next.

    Args:
        width: children taken per node, and nodes expanded per level.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self.origin = torch.empty(0)  # [B, beam] parents of the newest beam in the beam before
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []  # pool indices
        self._scores: list[Tensor] = []
        self._beams: list[tuple[Tensor, Tensor]] = []  # tokens, parents among expanded nodes
        self._visible: Tensor | None = None  # [B, beam, expanded] ancestors of the newest beam
        self._beam_pool: Tensor | None = None  # [B, beam] pool indices of the newest beam
        self._beam_scores: Tensor | None = None

    @property
    def beam_size(self) -> int:
        """Nodes of the newest beam."""
        return self._beams[-1][0].shape[1]

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest beam, to be fed to a model.

        Returns:
            tokens [B, beam]; which of the S expanded nodes each of them sees, bool [B, beam, S],
            the beam itself last; and the levels [S] of these nodes, 0 for the root's children.
        """
        assert self._visible is not None
        sizes = [tokens.shape[1] for tokens, _ in self._beams]
        levels = [level for level, size in enumerate(sizes) for _ in range(size)]
        tokens = self._beams[-1][0]
        return tokens, self._visible, torch.tensor(levels, device=tokens.device)

    def _extend_visible(self, origin: Tensor) -> Tensor:
        """What the next beam sees: what its parents saw, and each node itself."""
        batch, beam = origin.shape
        itself = torch.eye(beam, dtype=torch.bool, device=origin.device).expand(batch, -1, -1)
        if self._visible is None:
            return itself
        index = origin.unsqueeze(2).expand(-1, -1, self._visible.shape[2])
        return torch.cat([self._visible.gather(1, index), itself], 2)

    def add_level(
        self, log_probs: Tensor, ids: Tensor | None = None, *, is_last: bool = False
    ) -> None:
        """Add the top children of the newest beam, from its log-probabilities [B, beam, V].

        `ids` [V] names the tokens that the columns stand for, None if they are token ids. The last
        level has no beam.
        """
        top = log_probs.topk(min(self._width, log_probs.shape[-1]), -1)
        batch, beam, width = top.indices.shape
        above = top.values.new_zeros(batch, 1) if self._beam_scores is None else self._beam_scores
        scores = (above.unsqueeze(2) + top.values).flatten(1)  # [B, beam * width]
        tokens = (top.indices if ids is None else ids[top.indices]).flatten(1)
        if self._beam_pool is None:
            parents = torch.full_like(tokens, -1)
        else:
            parents = self._beam_pool.repeat_interleave(width, 1)
        first = sum(part.shape[1] for part in self._tokens)
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._scores.append(scores)
        if is_last:
            return
        best = scores.topk(min(self._width, scores.shape[1]), 1)
        expanded_before = sum(part.shape[1] for part, _ in self._beams)
        beam_parents = torch.full_like(best.indices, -1)
        self.origin = best.indices // width
        if self._beams:
            beam_parents = expanded_before - beam + self.origin
        self._visible = self._extend_visible(self.origin)
        self._beams.append((tokens.gather(1, best.indices), beam_parents))
        self._beam_pool, self._beam_scores = best.indices + first, best.values

    def expanded(self) -> Draft:
        """The nodes of all beams so far, as a draft to score."""
        tokens = torch.cat([part for part, _ in self._beams], 1)
        parents = torch.cat([part for _, part in self._beams], 1)
        return Draft.tree(tokens, parents, depth=len(self._beams))

    def best(self, max_nodes: int, budget: Sequence[int]) -> Draft:
        """Rerank the whole pool to the node budget, and row b to `budget[b]` nodes."""
        parents, scores = torch.cat(self._parents, 1), torch.cat(self._scores, 1)
        row_budgets = torch.tensor(budget, device=scores.device)
        kept = best_first(scores, parents, min(max_nodes, max(budget)), row_budgets)
        tokens = torch.cat(self._tokens, 1).gather(1, kept.nodes.clamp(min=0))
        tokens = tokens.masked_fill(kept.nodes < 0, -1)
        confidence = scores.gather(1, kept.nodes.clamp(min=0)).exp()
        return Draft.tree(
            tokens, kept.parents, kept.lengths, len(self._tokens), confidence=confidence
        )


def guessed_acceptance(depth: int, width: int) -> list[list[float]]:
    """An acceptance by depth and rank where nothing was measured: each rank halves it."""
    return [[0.6 * 0.5**rank for rank in range(width)] for _ in range(depth)]


@dataclass(frozen=True)
class TreeShape:
    """The options of a neural drafter's tree. Counts drafted nodes and levels, never the root.

    Attributes:
        depth: levels, at least 1.
        width: a dynamic tree expands this many nodes a level and takes as many children of each;
            1 makes a chain.
        max_nodes: node budget.
        choices: a static tree, one list of ranks a node; None for a dynamic tree (EAGLE-2).
        children: "top" (deterministic), "without_replacement" or "with_replacement" (sampled, with
            their q). A sampled tree is always static, because it may not be pruned once its
            tokens are seen: without `choices` one is computed from `width` and `max_nodes`.
    """

    depth: int = 5
    width: int = 8
    max_nodes: int = 24
    choices: Sequence[Sequence[int]] | None = field(default=None)
    children: str = "top"

    def __post_init__(self) -> None:
        require_counts(depth=self.depth, width=self.width, max_nodes=self.max_nodes)
        if self.children not in CHILDREN:
            raise ValueError(
                f"children is {self.children!r} but must be one of {', '.join(CHILDREN)}"
            )
        if self.choices is not None and not self.choices:
            raise ValueError("choices is [] but must hold at least one node, or be left out")

    @property
    def is_static(self) -> bool:
        """Whether the shape is fixed before any token is seen."""
        return self.choices is not None or self.children != "top" or self.width == 1

    def static_plan(self, vocab_size: int, device: torch.device) -> StaticPlan:
        """The fixed shape: the given choices, or the best tree of a guessed acceptance.

        Raises:
            ValueError: a rank that a draft vocabulary of `vocab_size` tokens does not have.
        """
        if self.choices is not None:
            highest = max((max(path) for path in self.choices if path), default=0)
            if highest >= vocab_size:
                raise ValueError(
                    f"choices hold the rank {highest} but the drafter has {vocab_size} tokens; "
                    f"use ranks below {vocab_size}"
                )
            return plan_levels(from_choices(self.choices, device))
        if self.width == 1:
            num_levels = min(self.depth, self.max_nodes)
            chain = [(0,) * (level + 1) for level in range(num_levels)]
            return plan_levels(from_choices(chain, device))
        table = guessed_acceptance(self.depth, min(self.width, vocab_size))
        return plan_levels(from_choices(best_static_tree(table, self.max_nodes), device))


class DynamicGrowth:
    """EAGLE-2's tree: the best candidates of each level are expanded, the best of all are kept."""

    def __init__(self, shape: TreeShape, num_levels: int) -> None:
        self._pool = CandidatePool(shape.width)
        self._max_nodes, self._num_levels, self._level = shape.max_nodes, num_levels, 0

    @property
    def is_done(self) -> bool:
        """Whether every level has its candidates."""
        return self._level == self._num_levels

    @property
    def origin(self) -> Tensor:
        """Parents [B, beam] of the newest beam in the beam before."""
        return self._pool.origin

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `CandidatePool.newest`."""
        return self._pool.newest

    def add_level(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """Add the best children of the newest beam from its scores [B, beam, V]."""
        self._level += 1
        # Where all that the head can say is banned, no child is a candidate.
        log_probs = scores.float().log_softmax(-1).nan_to_num(nan=-inf, neginf=-inf)
        self._pool.add_level(log_probs, ids, is_last=self.is_done)

    def expanded(self) -> tuple[Draft, Tensor]:
        """All fed nodes as a draft, and the rows [beam] of the newest beam in its logits."""
        draft = self._pool.expanded()
        last = draft.num_nodes + 1
        return draft, torch.arange(last - self._pool.beam_size, last, device=draft.tokens.device)

    def draft(self, budget: Sequence[int]) -> Draft:
        """Rerank the candidates to the node budget, and every row to its own."""
        return self._pool.best(self._max_nodes, budget)


Growth = DynamicGrowth | StaticGrowth


def start_growth(
    shape: TreeShape,
    static: StaticPlan | None,
    budget: int,
    sampler: Sampler,
    counters: Tensor,
) -> Growth:
    """Begin a tree of this shape.

    Args:
        shape: the options.
        static: `shape.static_plan()` where the shape is static, worked out once.
        budget: the largest of the rows' budgets; no level is grown that it cannot pay for.
        sampler: of the batch.
        counters: [B] committed tokens, for the rows' randomness.
    """
    if static is not None:
        return StaticGrowth(static, shape.children, budget, sampler, counters)
    return DynamicGrowth(shape, min(shape.depth, budget))
