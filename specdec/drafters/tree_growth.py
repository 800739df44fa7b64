"""Growing a draft tree: options of its shape, and how static and dynamic shapes are filled.

A *static* shape is fixed before any token is seen; its children may be chosen or sampled. A
*dynamic* tree (EAGLE-2) keeps the best candidates, all of them chosen: a sampled tree that is
pruned after its tokens are seen is no longer drawn from the q it reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import require_counts
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample, sample_without_replacement
from specdec.verify import Draft, best_first
from specdec.verify.tree import StaticTree, best_static_tree, from_choices

CHILDREN = ("top", "without_replacement", "with_replacement")
# Level i of a sampled tree draws from stream 64 + i of its row's randomness.
FIRST_STREAM = 64


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
            their q). A sampled tree is always static: without `choices` one is computed from
            `width` and `max_nodes`.
    """

    depth: int = 5
    width: int = 8
    max_nodes: int = 24
    choices: Sequence[Sequence[int]] | None = None
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
        """Tell if the shape is fixed before any token is seen."""
        return self.choices is not None or self.children != "top" or self.width == 1

    def static_plan(self, vocab_size: int, device: torch.device) -> "StaticPlan":
        """The fixed shape: the given choices, a chain, or the best tree of a guessed acceptance."""
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


@dataclass(frozen=True, eq=False)
class _Level:
    """Index tensors of one level of a static tree.

    Attributes:
        parent_places: [nodes] places of their parents in the beam before.
        parents_before: [nodes] places of their parents in the level before.
        ranks: [nodes] ranks among their siblings.
        num_children: most children of any node of the beam before.
        is_single: one node, as in a chain.
        expanded: [beam] places of the nodes with children, within this level.
        origin: [beam] places of their parents in the beam before.
        visible: [beam, fed so far] ancestors of each node of the beam, itself included.
        fed_levels: [fed so far] levels of all expanded nodes, 0 for the root's children.
    """

    parent_places: Tensor
    parents_before: Tensor
    ranks: Tensor
    num_children: int
    is_single: bool
    expanded: Tensor
    origin: Tensor
    visible: Tensor
    fed_levels: Tensor


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
        """Tell if no node has a sibling."""
        return self.num_nodes == self.tree.depth

    def num_levels(self, budget: int) -> int:
        """Levels that the first `budget` nodes reach, at least 1; nodes are sorted by level."""
        return self.depths[min(budget, self.num_nodes) - 1]


def plan_levels(tree: StaticTree) -> StaticPlan:
    """Work out each level's indices; `StaticTree` sorts nodes by level, then by ranks."""
    device = tree.parents.device
    parents, ranks, depths = (x.tolist() for x in (tree.parents, tree.ranks, tree.depths))

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    paths: list[set[int]] = []  # each node with its ancestors
    for node, parent in enumerate(parents):
        paths.append({node} if parent < 0 else {node} | paths[parent])
    levels: list[_Level] = []
    fed: list[int] = []  # nodes fed so far, in order
    beam_before, nodes_before = [-1], [-1]
    for depth in range(1, tree.depth + 1):
        nodes = [node for node, at in enumerate(depths) if at == depth]
        beam = [node for node in nodes if node in parents]
        fed += beam
        num_children = max(ranks[node] for node in nodes) + 1
        seen = [[other in paths[node] for other in fed] for node in beam]
        levels.append(
            _Level(
                parent_places=index([beam_before.index(parents[node]) for node in nodes]),
                parents_before=index([nodes_before.index(parents[node]) for node in nodes]),
                ranks=index([ranks[node] for node in nodes]),
                num_children=num_children,
                is_single=num_children == len(beam_before) == 1,
                expanded=index([nodes.index(node) for node in beam]),
                origin=index([beam_before.index(parents[node]) for node in beam]),
                visible=torch.tensor(seen, dtype=torch.bool, device=device),
                fed_levels=index([depths[node] - 1 for node in fed]),
            )
        )
        beam_before, nodes_before = beam, nodes
    return StaticPlan(tree, levels, depths)


class StaticGrowth:
    """Fills a `StaticTree` with tokens, level by level.

    Args:
        plan: the shape, see `plan_levels`.
        children: "top" takes each node's likeliest children, which is a point mass; the others
            sample them from the processed distribution and report its q.
        budget: the largest of the rows' budgets, at least 1; levels behind it are left out.
        sampler: sampler of the batch; turns scores into the distribution that is sampled.
        counters: [B] int64 committed tokens, the counter of the rows' randomness.
    """

    def __init__(
        self, plan: StaticPlan, children: str, budget: int, sampler: Sampler, counters: Tensor
    ) -> None:
        self._plan = plan
        self.level, self.num_levels = 0, plan.num_levels(budget)
        # At temperature 0 a distribution holds one token, and a sampled tree one path.
        self._children = "top" if sampler.is_greedy else children
        self._sampler, self._counters = sampler, counters
        # Each list holds one tensor a level.
        self._tokens: list[Tensor] = []
        self._probs: list[Tensor] = []
        self._alive: list[Tensor] = []
        self._confidence: list[Tensor] = []  # logs, of chosen children only
        self.origin = torch.empty(0)  # [B, beam] parents of the newest beam in the beam before

    @property
    def is_done(self) -> bool:
        """Tell if every level has its tokens."""
        return self.level == self.num_levels

    def add_level(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """Choose the next level's tokens from the processed scores [B, beam, V] of the newest beam.

        `ids` [V] names the tokens that the columns stand for, None if they are token ids.
        """
        level = self._plan.levels[self.level]
        if self._children == "top":
            chosen = self._choose(scores, ids, level)
        else:
            chosen = self._sample(scores, level)
            self._alive.append(chosen >= 0)
        self._tokens.append(chosen)  # [B, nodes of this level]
        self.level += 1
        self.origin = level.origin.expand(len(chosen), -1)

    def _choose(self, scores: Tensor, ids: Tensor | None, level: _Level) -> Tensor:
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

    def _sample(self, scores: Tensor, level: _Level) -> Tensor:
        """Draw every node's children, -1 where nothing is left, and keep their q."""
        # Where the settings ban all that the head can say, its distribution is empty, not NaN.
        probs = self._sampler.probs(scores).nan_to_num(0.0)  # [B, beam, V]
        batch, beam, vocab = probs.shape
        k, stream = level.num_children, FIRST_STREAM + self.level
        seeds = self._sampler.seeds
        if self._children == "with_replacement":
            noise = row_exponentials(seeds, self._counters, stream, beam * k * vocab)
            drawn = sample(probs.unsqueeze(2), noise.view(batch, beam, k, vocab))
            drawn = drawn.masked_fill(probs.sum(-1, keepdim=True) == 0, -1)
            drawn_from = probs.unsqueeze(2).expand(-1, -1, k, -1)
        else:
            noise = row_exponentials(seeds, self._counters, stream, beam * vocab)
            drawn = sample_without_replacement(probs, noise.view_as(probs), k)
            drawn_from = _without_earlier(probs, drawn)
        self._probs.append(drawn_from[:, level.parent_places, level.ranks])
        return drawn[:, level.parent_places, level.ranks]

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes of the newest level that have children; see `DynamicGrowth.newest`."""
        level = self._plan.levels[self.level - 1]
        tokens = self._tokens[-1][:, level.expanded].clamp(min=0)
        visible = level.visible.expand(len(tokens), -1, -1)
        return tokens, visible, level.fed_levels

    def expanded(self) -> tuple[Draft, Tensor]:
        """All nodes so far as a draft, and the rows [beam] of the newest beam in its logits."""
        tokens = torch.cat(self._tokens, 1)
        count = tokens.shape[1]
        level = self._plan.levels[self.level - 1]
        rows = count - self._tokens[-1].shape[1] + 1 + level.expanded
        return Draft.tree(tokens, self._plan.tree.parents[:count], depth=self.level), rows

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
        if num_nodes == self.level and (self._plan.is_chain or probs is None):
            return Draft.chain(tokens.masked_fill(~real, -1), real.sum(1), probs, confidence)
        parents = self._plan.tree.parents[:num_nodes]
        if probs is not None:
            alive = real & self._reachable(_first(self._alive, num_nodes))
            return _compact(tokens, parents, probs, alive, self.level)
        return Draft.tree(
            tokens.masked_fill(~real, -1),
            parents.masked_fill(~real, -1),
            real.sum(1),
            self.level,
            confidence=confidence,
        )

    def _reachable(self, alive: Tensor) -> Tensor:
        """Nodes whose whole path was drawn: below a distribution without tokens nothing hangs.

        That is decided by its support, before a token is seen, so it biases nothing.
        """
        above = pad(alive, (1, 0), value=True)  # [B, N + 1], column 0 the root
        for _ in range(self.level - 1):
            above[:, 1:] &= above[:, self._plan.tree.parents[: alive.shape[1]] + 1]
        return above[:, 1:]


def _first(levels: list[Tensor], count: int) -> Tensor:
    """The first nodes of all levels together."""
    return torch.cat(levels, 1)[:, :count]


def _without_earlier(probs: Tensor, drawn: Tensor) -> Tensor:
    """The distribution of each draw given the draws before it: [B, beam, k, V], normalized."""
    batch, beam, vocab = probs.shape
    k = drawn.shape[2]
    left = pad(probs, (0, 1)).unsqueeze(2).repeat(1, 1, k, 1)
    earlier = torch.ones(k, k, dtype=torch.bool, device=probs.device).tril(-1)
    # The column behind the vocabulary takes the writes that are not meant.
    index = torch.where(earlier & (drawn >= 0).unsqueeze(2), drawn.unsqueeze(2), vocab)
    left = left.scatter(3, index.expand(batch, beam, k, k), 0.0)[..., :vocab]
    return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)


def _compact(tokens: Tensor, parents: Tensor, probs: Tensor, alive: Tensor, depth: int) -> Draft:
    """Close the gaps of nodes that are not alive; order and parents are kept."""
    order = (~alive).to(torch.uint8).sort(dim=1, stable=True).indices  # [B, N] alive ones first
    places = alive.cumsum(1) - 1
    lengths = alive.sum(1)
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    above = pad(places, (1, 0), value=-1)  # [B, N + 1], column 0 the root
    renamed = above.gather(1, (parents + 1).expand(tokens.shape)).gather(1, order)
    return Draft.tree(
        tokens.gather(1, order).masked_fill(~real, -1),
        renamed.masked_fill(~real, -1),
        lengths,
        depth,
        probs.gather(1, order.unsqueeze(2).expand_as(probs)),
    )


class DynamicGrowth:
    """EAGLE-2's tree: the best candidates of each level are expanded, the best of all are kept.

    Args:
        width: children taken per node, and nodes expanded per level.
        max_nodes: node budget.
        num_levels: levels to grow.
    """

    def __init__(self, width: int, max_nodes: int, num_levels: int) -> None:
        self._width, self.max_nodes = width, max_nodes
        self.level, self.num_levels = 0, num_levels
        self.origin = torch.empty(0)  # [B, beam] parents of the newest beam in the beam before
        # All candidates, one tensor [B, candidates] a level; parents are indices among them.
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._scores: list[Tensor] = []
        # Expanded nodes, one tensor [B, beam] a level; parents are indices among them.
        self._beam_tokens: list[Tensor] = []
        self._beam_parents: list[Tensor] = []
        # The newest beam: its candidates' indices and scores, and the expanded nodes it sees.
        self._beam: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_done(self) -> bool:
        """Tell if every level has its candidates."""
        return self.level == self.num_levels

    def add_level(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """Add the likeliest children of the newest beam, from its scores [B, beam, V].

        `ids` [V] names the tokens that the columns stand for, None if they are token ids. The last
        level has no beam.
        """
        # Where all that the head can say is banned, no child is a candidate.
        log_probs = scores.float().log_softmax(-1).nan_to_num(nan=-inf, neginf=-inf)
        top = log_probs.topk(min(self._width, log_probs.shape[-1]), -1)
        batch, _, width = top.indices.shape
        tokens = (top.indices if ids is None else ids[top.indices]).flatten(1)
        if self._beam is None:
            parents, above = torch.full_like(tokens, -1), top.values.new_zeros(batch, 1)
        else:
            parents, above = self._beam[0].repeat_interleave(width, 1), self._beam[1]
        totals = (above.unsqueeze(2) + top.values).flatten(1)  # [B, beam * width]
        first = sum(part.shape[1] for part in self._tokens)
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._scores.append(totals)
        self.level += 1
        if not self.is_done:
            best = totals.topk(min(self._width, totals.shape[1]), 1)
            self.origin = best.indices // width
            self._expand(tokens.gather(1, best.indices), best.indices + first, best.values)

    def _expand(self, tokens: Tensor, candidates: Tensor, scores: Tensor) -> None:
        """Make these candidates [B, beam] the newest beam; `origin` tells their parents."""
        batch, beam = tokens.shape
        visible = torch.eye(beam, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        parents = torch.full_like(tokens, -1)
        if self._beam is not None:
            seen = self._beam[2]  # [B, beam before, expanded before]
            parents = seen.shape[2] - seen.shape[1] + self.origin
            index = self.origin.unsqueeze(2).expand(-1, -1, seen.shape[2])
            visible = torch.cat([seen.gather(1, index), visible], 2)
        self._beam_tokens.append(tokens)
        self._beam_parents.append(parents)
        self._beam = candidates, scores, visible

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest beam, to be fed to a model.

        Returns:
            tokens [B, beam]; which of the S expanded nodes each of them sees, bool [B, beam, S],
            the beam itself last; and the levels [S] of these nodes, 0 for the root's children.
        """
        assert self._beam is not None
        levels = [at for at, part in enumerate(self._beam_tokens) for _ in range(part.shape[1])]
        tokens = self._beam_tokens[-1]
        return tokens, self._beam[2], torch.tensor(levels, device=tokens.device)

    def expanded(self) -> tuple[Draft, Tensor]:
        """All expanded nodes as a draft, and the rows [beam] of the newest beam in its logits."""
        tokens, parents = torch.cat(self._beam_tokens, 1), torch.cat(self._beam_parents, 1)
        draft = Draft.tree(tokens, parents, depth=len(self._beam_tokens))
        last = draft.num_nodes + 1
        beam = self._beam_tokens[-1].shape[1]
        return draft, torch.arange(last - beam, last, device=tokens.device)

    def draft(self, budget: Sequence[int]) -> Draft:
        """Rerank all candidates to the node budget, and row b to `budget[b]` nodes."""
        parents, scores = torch.cat(self._parents, 1), torch.cat(self._scores, 1)
        row_budgets = torch.tensor(budget, device=scores.device)
        kept = best_first(scores, parents, min(self.max_nodes, max(budget)), row_budgets)
        nodes = kept.nodes.clamp(min=0)
        tokens = torch.cat(self._tokens, 1).gather(1, nodes).masked_fill(kept.nodes < 0, -1)
        confidence = scores.gather(1, nodes).exp()
        return Draft.tree(
            tokens, kept.parents, kept.lengths, len(self._tokens), confidence=confidence
        )


Growth = DynamicGrowth | StaticGrowth


def child_scores(growth: Growth, logits: Tensor, sampler: Sampler) -> Tensor:
    """Process logits [B, beam, V] of the newest beam, each node in the context of its path."""
    if sampler.is_plain:
        return logits
    if growth.level == 0:
        return sampler.scores(logits)
    draft, rows = growth.expanded()
    return sampler.scores(logits, draft, rows.expand(len(logits), -1))
