"""Growing a draft tree: options of its shape, and how static and dynamic shapes are filled.

A *static* shape is fixed before any token is seen; its children may be chosen or sampled. A
*dynamic* tree (EAGLE-2) keeps the best candidates, all of them chosen: a sampled tree that is
pruned after its tokens are seen is no longer drawn from the q it reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import require_counts
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample, sample_without_replacement
from specdec.verify import Draft, Selection, ancestor_mask, best_first
from specdec.verify.tree import StaticTree, best_static_tree, delayed_tree, from_choices

# Lists of ranks, or the arguments of `delayed_tree`.
Choices = Sequence[Sequence[int]] | Mapping[str, int]
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
        choices: a static tree, one list of ranks a node, or {stem, branches, depth} of a
            `delayed_tree`; None for a dynamic tree (EAGLE-2).
        children: "top" (deterministic), "without_replacement" or "with_replacement" (sampled, with
            their q). A sampled tree is always static: without `choices` one is computed from
            `width` and `max_nodes`.
    """

    depth: int = 5
    width: int = 8
    max_nodes: int = 24
    choices: Choices | None = None
    children: str = "top"

    def __post_init__(self) -> None:
        require_counts(depth=self.depth, width=self.width, max_nodes=self.max_nodes)
        if self.children not in CHILDREN:
            raise ValueError(
                f"children is {self.children!r} but must be one of {', '.join(CHILDREN)}"
            )
        if isinstance(self.choices, Mapping):
            if set(self.choices) != {"stem", "branches", "depth"}:
                raise ValueError(
                    f"choices is {dict(self.choices)} but must hold stem, branches and depth, or "
                    "be a list of nodes"
                )
            object.__setattr__(self, "choices", delayed_tree(**self.choices))
        if self.choices is not None and not self.choices:
            raise ValueError("choices is [] but must hold at least one node, or be left out")

    @property
    def is_static(self) -> bool:
        return self.choices is not None or self.children != "top" or self.width == 1

    def static_tree(self, vocab_size: int, device: torch.device) -> StaticTree:
        """The given choices, or the best tree (of width 1: the chain) of a guessed acceptance."""
        choices: Any = self.choices
        if choices is None:
            table = guessed_acceptance(self.depth, min(self.width, vocab_size))
            choices = best_static_tree(table, self.max_nodes)
        tree = from_choices(choices, device)
        if (highest := int(tree.ranks.max())) >= vocab_size:
            raise ValueError(
                f"choices hold the rank {highest} but the drafter has {vocab_size} tokens; "
                f"use ranks below {vocab_size}"
            )
        return tree


class Candidates(NamedTuple):
    """One level of a tree before it is cut to its budget."""

    tokens: Tensor  # [B, candidates]
    scores: Tensor  # [B, candidates] log-probabilities of the paths down to them
    parents: Tensor  # [B, candidates] among all candidates, -1 for the root


@dataclass(frozen=True, eq=False)
class _Level:
    """Index tensors of one level of a static tree, whose *beam* are its nodes with children."""

    num_parents: int  # nodes of the beam before
    parent_places: Tensor  # [nodes] in the beam before
    parents_before: Tensor  # [nodes] places of their parents in the level before
    ranks: Tensor  # [nodes] among their siblings
    num_children: int  # most children of any node of the beam before
    expanded: Tensor  # [beam] places within this level
    origin: Tensor  # [beam] places of their parents in the beam before
    visible: Tensor  # [beam, fed so far] ancestors of each node, itself included
    fed_levels: Tensor  # [fed so far] of all expanded nodes, 0 for the root's children


class StaticPlan:
    """A static tree and the indices of its levels, worked out once for all steps."""

    def __init__(self, tree: StaticTree) -> None:
        self.tree, self.num_nodes = tree, len(tree.parents)
        self.is_chain = self.num_nodes == tree.depth
        self.depths: list[int] = tree.depths.tolist()
        # `StaticTree` sorts nodes by level, then by ranks, so that all indices here ascend.
        has_children = torch.isin(torch.arange(self.num_nodes).to(tree.parents), tree.parents)
        ancestors = ancestor_mask(tree.parents.unsqueeze(0), tree.depth)[0]
        beam, expanded = tree.parents.new_tensor([-1]), tree.parents.new_tensor([0])
        self.levels: list[_Level] = []
        for depth in range(1, tree.depth + 1):
            nodes = (tree.depths == depth).nonzero().flatten()
            fed = ((tree.depths <= depth) & has_children).nonzero().flatten()
            places, parents_in_level = torch.searchsorted(beam, tree.parents[nodes]), expanded
            expanded = has_children[nodes].nonzero().flatten()
            beam = nodes[expanded]
            self.levels.append(
                _Level(
                    num_parents=len(parents_in_level),
                    parent_places=places,
                    parents_before=parents_in_level[places],
                    ranks=tree.ranks[nodes],
                    num_children=int(tree.ranks[nodes].max()) + 1,
                    expanded=expanded,
                    origin=places[expanded],
                    visible=ancestors[beam][:, fed],
                    fed_levels=tree.depths[fed] - 1,
                )
            )


class StaticGrowth:
    """Fills a `StaticTree` with tokens, level by level.

    Levels behind `budget`, the largest of the rows' budgets, are left out; `counters` [B] are the
    numbers of committed tokens, which the rows' randomness depends on.
    """

    def __init__(
        self, plan: StaticPlan, children: str, budget: int, sampler: Sampler, counters: Tensor
    ) -> None:
        self._plan, self.sampler, self._counters = plan, sampler, counters
        self.level, self.num_levels = 0, plan.depths[min(budget, plan.num_nodes) - 1]
        # At temperature 0 a distribution holds one token, and a sampled tree one path.
        self._children = "top" if sampler.is_greedy else children
        # Each list holds one tensor a level.
        self._tokens: list[Tensor] = []
        self._probs: list[Tensor] = []  # of sampled children
        self._confidence: list[Tensor] = []  # logs, of chosen children

    @property
    def origin(self) -> Tensor:
        """Parents [B, beam] of the newest beam in the beam before."""
        return self._plan.levels[self.level - 1].origin.expand(len(self._tokens[0]), -1)

    def add_level(self, logits: Tensor, ids: Tensor | None = None) -> None:
        """Choose the next level's tokens from the logits [B, beam or 1, V] of the newest beam.

        `ids` [V] names the tokens that the columns stand for, None if they are token ids.
        """
        level = self._plan.levels[self.level]
        scores = child_scores(self, logits.expand(-1, level.num_parents, -1))
        if self._children == "top":
            tokens = self._choose(scores, level)
        else:
            tokens = self._sample(scores, level)
        self._tokens.append(tokens if ids is None else ids[tokens])  # [B, nodes of this level]
        self.level += 1

    def _choose(self, scores: Tensor, level: _Level) -> Tensor:
        """Take every node's likeliest children, and note how likely they are."""
        shares = scores.float().log_softmax(-1)
        if scores.shape[1] == level.num_children == 1:
            share, chosen = shares[:, 0].max(-1, keepdim=True)
        else:
            top = shares.topk(min(level.num_children, shares.shape[-1]), -1)
            chosen, share = (each[:, level.parent_places, level.ranks] for each in reversed(top))
        if self._confidence:
            share = share + self._confidence[-1][:, level.parents_before]
        self._confidence.append(share)
        return chosen

    def _sample(self, scores: Tensor, level: _Level) -> Tensor:
        """Draw every node's children, -1 where nothing is left, and keep their q."""
        # Where the settings ban all that the head can say, its distribution is empty, not NaN.
        probs = self.sampler.probs(scores).nan_to_num(0.0)  # [B, beam, V]
        (batch, beam, vocab), k = probs.shape, level.num_children
        num_races = k if self._children == "with_replacement" else 1
        stream, size = FIRST_STREAM + self.level, beam * num_races * vocab
        noise = row_exponentials(self.sampler.seeds, self._counters, stream, size)
        if self._children == "with_replacement":
            drawn = sample(probs.unsqueeze(2), noise.view(batch, beam, k, vocab))
            drawn = drawn.masked_fill(probs.sum(-1, keepdim=True) == 0, -1)
            drawn_from = probs.unsqueeze(2).expand(-1, -1, k, -1)
        else:
            drawn = sample_without_replacement(probs, noise.view_as(probs), k)
            drawn_from = _without_earlier(probs, drawn)
        self._probs.append(drawn_from[:, level.parent_places, level.ranks])
        return drawn[:, level.parent_places, level.ranks]

    def take(self, levels: list[Candidates]) -> None:
        """Take the levels of a chain as they were grown elsewhere."""
        self._tokens, self._confidence = ([level[i] for level in levels] for i in (0, 1))
        self.level = len(levels)

    @property
    def beam(self) -> Tensor:
        """Tokens [B, beam] of the nodes of the newest level that have children."""
        return self._tokens[-1][:, self._plan.levels[self.level - 1].expanded].clamp(min=0)

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest beam; see `DynamicGrowth.newest`."""
        level, tokens = self._plan.levels[self.level - 1], self.beam
        return tokens, level.visible.expand(len(tokens), -1, -1), level.fed_levels

    def expanded(self) -> tuple[Draft, Tensor]:
        """All nodes so far as a draft, and the rows [beam] of the newest beam in its logits."""
        tokens, newest = torch.cat(self._tokens, 1), self._tokens[-1].shape[1]
        count = tokens.shape[1]
        rows = count - newest + 1 + self._plan.levels[self.level - 1].expanded
        return Draft.tree(tokens, self._plan.tree.parents[:count], depth=self.level), rows

    def draft(self, budget: Sequence[int]) -> Draft:
        """All levels as a draft, row b cut to its first `budget[b]` nodes."""
        tokens = torch.cat(self._tokens, 1)[:, : max(budget)]
        count = tokens.shape[1]
        parents = self._plan.tree.parents[:count]
        row_budgets = torch.tensor(budget, device=tokens.device)
        real = torch.arange(count, device=tokens.device) < row_budgets.unsqueeze(1)
        if self._probs:
            probs = torch.cat(self._probs, 1)[:, :count]
            if self._plan.is_chain:
                alive = real & (tokens.cummin(1).values >= 0)
                return Draft.chain(tokens.masked_fill(~alive, -1), alive.sum(1), probs)
            alive = real & self._reachable(tokens >= 0)
            kept = best_first(torch.where(alive, 0.0, -inf), parents.expand_as(tokens), count)
            return selected(kept, tokens, self.level, probs)
        tokens, lengths = tokens.masked_fill(~real, -1), real.sum(1)
        confidence = torch.cat(self._confidence, 1)[:, :count].exp().nan_to_num(0.0)
        if count == self.level:
            return Draft.chain(tokens, lengths, confidence=confidence)
        parents = parents.masked_fill(~real, -1)
        return Draft.tree(tokens, parents, lengths, self.level, confidence=confidence)

    def _reachable(self, alive: Tensor) -> Tensor:
        """Nodes whose whole path was drawn: below a distribution without tokens nothing hangs.

        That is decided by its support, before a token is seen, so it biases nothing.
        """
        above = pad(alive, (1, 0), value=True)  # [B, N + 1], column 0 the root
        for _ in range(self.level - 1):
            above[:, 1:] &= above[:, self._plan.tree.parents[: alive.shape[1]] + 1]
        return above[:, 1:]


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


def best_children(
    scores: Tensor, above: Tensor, places: Tensor, count: int, ids: Tensor | None
) -> Candidates:
    """Take the `count` likeliest children of every node of a beam.

    Args:
        scores: [B, beam, V] logits, processed or not; [B, 1, V] where all nodes share them.
        above: [B, beam] log-probabilities of the paths down to the beam.
        places: [B, beam] of its nodes among all candidates, -1 for the root.
        ids: [V] tokens that the columns stand for, None if they are token ids.
    """
    # In half precision a log-sum would be off by percents, and confidences are multiplied.
    top = scores.float().log_softmax(-1).topk(count, -1)
    # Where all that the head can say is banned, no child is a candidate.
    totals = top.values.nan_to_num(nan=-inf, neginf=-inf) + above.unsqueeze(2)
    tokens = (top.indices if ids is None else ids[top.indices]).expand_as(totals)
    parents = places.unsqueeze(2).expand_as(totals)
    return Candidates(tokens.flatten(1), totals.flatten(1), parents.flatten(1))


class _Beam(NamedTuple):
    """The nodes of one level that are expanded."""

    tokens: Tensor  # [B, beam]
    above: Tensor  # [B, beam] log-probabilities of the paths down to them
    places: Tensor  # [B, beam] among all candidates
    origin: Tensor  # [B, beam] parents in the beam before
    visible: Tensor  # [B, beam, S] which of all expanded nodes each one sees, the beam itself last


class DynamicGrowth:
    """EAGLE-2's tree: the best candidates of each level are expanded, the best of all are kept.

    `width` children are taken of each node, and as many nodes expanded per level.
    """

    def __init__(self, width: int, max_nodes: int, num_levels: int, sampler: Sampler) -> None:
        self._width, self.max_nodes, self.sampler = width, max_nodes, sampler
        self.level, self.num_levels = 0, num_levels
        self._pool: list[Candidates] = []  # of each level
        self._num_candidates = 0
        self._beams: list[_Beam] = []  # of each level but the last
        self._itself = torch.empty(0)  # [B, beam, beam] identity

    @property
    def origin(self) -> Tensor:
        """Parents [B, beam] of the newest beam in the beam before."""
        return self._beams[-1].origin

    def add_level(self, logits: Tensor, ids: Tensor | None = None) -> None:
        """Add the likeliest children of the newest beam, from its logits [B, beam or 1, V].

        `ids` [V] names the tokens that the columns stand for, None if they are token ids. The last
        level has no beam.
        """
        scores = child_scores(self, logits)
        count = min(self._width, scores.shape[-1])
        if self._beams:
            above, places = self._beams[-1].above, self._beams[-1].places
        else:
            above = torch.zeros(len(scores), 1, device=scores.device)
            places = torch.full((len(scores), 1), -1, device=scores.device)
        level = best_children(scores, above, places, count, ids)
        self._pool.append(level)
        self.level += 1
        if self.level < self.num_levels:
            self._beams.append(self._expand(level, count))
        self._num_candidates += level.tokens.shape[1]

    def _expand(self, level: Candidates, num_children: int) -> _Beam:
        """Keep the best candidates of the newest level as its beam."""
        best = level.scores.topk(min(self._width, level.scores.shape[1]), 1)
        batch, beam = best.indices.shape
        if self._itself.shape[1:] != (beam, beam):
            itself = torch.eye(beam, dtype=torch.bool, device=best.indices.device)
            self._itself = itself.expand(batch, -1, -1)
        origin, visible = best.indices // num_children, self._itself
        if self._beams:
            seen = self._beams[-1].visible
            above = seen.gather(1, origin.unsqueeze(2).expand(-1, -1, seen.shape[2]))
            visible = torch.cat([above, visible], 2)
        tokens, places = level.tokens.gather(1, best.indices), best.indices + self._num_candidates
        return _Beam(tokens, best.values, places, origin, visible)

    def take(self, levels: list[Candidates]) -> None:
        """Take all levels as they were grown elsewhere."""
        self._pool, self.level = levels, len(levels)

    @property
    def beam(self) -> Tensor:
        """Tokens [B, beam] of the newest beam."""
        return self._beams[-1].tokens

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest beam, to be fed to a model: its tokens [B, beam].

        Then which of the S expanded nodes each of them sees, bool [B, beam, S], the beam itself
        last, and the levels [S] of these nodes, 0 for the root's children.
        """
        beam = self._beams[-1]
        levels = [level for level, each in enumerate(self._beams) for _ in range(each[0].shape[1])]
        return beam.tokens, beam.visible, torch.tensor(levels, device=beam.tokens.device)

    def expanded(self) -> tuple[Draft, Tensor]:
        """All expanded nodes as a draft, and the rows [beam] of the newest beam in its logits."""
        tokens = torch.cat([beam.tokens for beam in self._beams], 1)
        parents, first = [torch.full_like(self._beams[0].origin, -1)], 0
        for before, beam in pairwise(self._beams):
            parents.append(first + beam.origin)
            first += before.origin.shape[1]
        end = tokens.shape[1] + 1
        rows = torch.arange(end - self.origin.shape[1], end, device=tokens.device)
        return Draft.tree(tokens, torch.cat(parents, 1), depth=len(self._beams)), rows

    def draft(self, budget: Sequence[int]) -> Draft:
        """Rerank all candidates to the node budget, and row b to `budget[b]` nodes."""
        tokens, scores, parents = (torch.cat(parts, 1) for parts in zip(*self._pool, strict=True))
        num_nodes, row_budgets = min(self.max_nodes, max(budget)), None
        if min(budget) < num_nodes:
            row_budgets = torch.tensor(budget, device=scores.device)
        kept = best_first(scores, parents, num_nodes, row_budgets)
        return selected(kept, tokens, len(self._pool), confidence=scores.exp())


Growth = DynamicGrowth | StaticGrowth


def child_scores(growth: Growth, logits: Tensor) -> Tensor:
    """Process logits [B, beam or 1, V] of the newest beam, each node in the context of its path."""
    if growth.sampler.is_plain:
        return logits
    if growth.level == 0:
        return growth.sampler.scores(logits)
    draft, rows = growth.expanded()
    logits = logits.expand(-1, len(rows), -1)
    return growth.sampler.scores(logits, draft, rows.expand(len(logits), -1))


def selected(
    kept: Selection,
    tokens: Tensor,
    depth: int,
    probs: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Draft:
    """The tree of those candidates [B, M, ...] that were kept."""
    nodes = kept.nodes.clamp(min=0)
    tokens = tokens.gather(1, nodes).masked_fill(kept.nodes < 0, -1)
    if probs is not None:
        probs = probs.gather(1, nodes.unsqueeze(2).expand(-1, -1, probs.shape[2]))
    if confidence is not None:
        confidence = confidence.gather(1, nodes)
    return Draft.tree(tokens, kept.parents, kept.lengths, depth, probs, confidence)
