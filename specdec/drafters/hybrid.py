"""Several drafters as one: their trees merged under one node budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import require_counts
from specdec.drafters.base import CachePasser, ShapeOptions, Tokens
from specdec.drafters.tree_growth import selected
from specdec.engine.interfaces import CatchesUp, Drafter, HoldsCache, Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict, best_first

NUM_BINS = 10
# The confidence itself counts as much as this many observations.
PRIOR_WEIGHT = 10.0


class Calibration:
    """Acceptance by source and confidence, as counts.

    A node's confidence here is the conditional one: that it is the child the target takes, given
    that its parent was taken. S sources.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        centres = (torch.arange(NUM_BINS, device=device) + 0.5) / NUM_BINS
        self._shown = torch.full((num_sources * NUM_BINS,), PRIOR_WEIGHT, device=device)
        self._taken = PRIOR_WEIGHT * centres.repeat(num_sources)
        self._first = NUM_BINS * torch.arange(num_sources, device=device)

    def _bins(self, confidence: Tensor) -> Tensor:
        """Index of each source's [S, ...] confidences in the counts."""
        bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        return bins + self._first.view(-1, *[1] * (confidence.dim() - 1))

    def acceptance(self, confidence: Tensor) -> Tensor:
        """Estimated acceptance [S, ...] of nodes with these conditional confidences [S, ...]."""
        return (self._taken / self._shown)[self._bins(confidence)]

    def add(self, confidence: Tensor, counted: Tensor, taken: Tensor) -> None:
        """Learn from nodes `taken` [...]; a source drafted those `counted` [S, ...].

        Of the others nothing is known, as their parents were not taken.
        """
        bins = self._bins(confidence).flatten()
        self._shown = self._shown.index_add(0, bins, counted.flatten().float())
        self._taken = self._taken.index_add(0, bins, (counted & taken).flatten().float())


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates from S sources, M in each row; topological."""

    tokens: Tensor  # [B, M]
    parents: Tensor  # [B, M] pool indices, -1 for a child of the root
    real: Tensor  # [B, M] bool; the others are padding, or stand elsewhere already
    confidence: Tensor  # [S, B, M] each source's confidence in the path; 0 where it has none
    depth: int  # at least the longest path

    def above(self, values: Tensor, root: float) -> Tensor:
        """Each candidate's parent's value; of [..., B, M], with `root` above the first level."""
        index = (self.parents + 1).expand(values.shape)
        return pad(values, (1, 0), value=root).gather(-1, index)


def pool_of(draft: Draft) -> Pool:
    """A draft of chosen tokens as a pool; without a confidence its nodes count as certain."""
    real, confidence = draft.real_nodes(), draft.confidence
    if confidence is None:
        confidence = torch.ones_like(draft.tokens, dtype=torch.float32)
    confidence = (confidence.float() * real).unsqueeze(0)
    return Pool(draft.tokens, draft.explicit_parents(), real, confidence, draft.depth)


def join(pool: Pool, new: Pool) -> Pool:
    """Add the pool of one more source for the same rows."""
    size, count = pool.tokens.shape[1], new.tokens.shape[1]
    place = torch.arange(size, size + count, device=new.tokens.device).expand(new.tokens.shape)
    above = torch.where(new.parents < 0, -1, new.parents + size)
    can_match = pool.real.unsqueeze(1) & new.real.unsqueeze(2)
    can_match = can_match & (pool.tokens.unsqueeze(1) == new.tokens.unsqueeze(2))  # [B, n, M]
    # A node stands in the pool if its parent does and a sibling there has its token: after round d
    # that is settled down to depth d.
    for _ in range(min(pool.depth, new.depth)):
        equal = can_match & (pool.parents.unsqueeze(1) == above.unsqueeze(2))
        is_there, where = equal.max(2)
        place = torch.where(is_there, where, place)
        above = torch.where(new.parents < 0, -1, place.gather(1, new.parents.clamp(min=0)))
    confidence = pad(pool.confidence, (0, count))
    own = torch.zeros_like(confidence[0]).scatter_add(1, place, new.confidence[0])
    return Pool(
        torch.cat([pool.tokens, new.tokens], 1),
        torch.cat([pool.parents, above], 1),
        torch.cat([pool.real, new.real & (place >= size)], 1),
        torch.cat([confidence, own.unsqueeze(0)]),
        max(pool.depth, new.depth),
    )


class HybridDrafter(CachePasser):
    """Merges the drafts of two or more drafters, equal paths joined, the likeliest nodes kept.

    How likely a node is, is its drafter's confidence, corrected by how often such nodes were
    accepted so far; of several drafters that propose it, the most confident counts. The corrections
    are shared by all rows and outlive them: past outputs change what is drafted, never what is
    emitted.

    Args:
        drafters: lookups first, then neural ones. Their tokens must be chosen, not sampled.
        max_nodes: node budget of the merged tree.
        enough: accepted tokens that a lookup must expect in every row for the drafters behind it
            not to be asked at all in this step; None asks all of them every time.
        calibrate: correct the confidences; False takes them as they are.
    """

    kind, title, makes_trees = "hybrid", "Hybrid", True
    shape_options: ClassVar[ShapeOptions] = ShapeOptions({"nodes": "max_nodes"}, varies=True)

    def __init__(
        self,
        drafters: Sequence[Drafter],
        max_nodes: int = 16,
        enough: float | None = 6.0,
        calibrate: bool = True,
    ) -> None:
        if len(drafters) < 2:
            raise ValueError(f"drafters holds {len(drafters)} but a hybrid merges at least two")
        require_counts(max_nodes=max_nodes)
        for drafter in drafters:
            children = getattr(getattr(drafter, "shape", None), "children", "top")
            if children != "top":
                raise ValueError(
                    f"a hybrid cannot hold children={children!r}: a sampled tree may not be "
                    "pruned; use children=top"
                )
            if getattr(drafter, "caches_draft", False):
                raise ValueError(
                    "a hybrid cannot hold a draft model that drafts chains: it keeps the accepted "
                    "part of its own draft in its cache; use width=2 or more"
                )
        self.drafters = list(drafters)
        self.max_nodes, self.enough, self.calibrate = max_nodes, enough, calibrate
        self.needs_target = any(getattr(drafter, "needs_target", True) for drafter in drafters)
        self.taps = tuple(sorted({tap for drafter in drafters for tap in drafter.taps}))
        clocks = [drafter.clock for drafter in drafters]
        self.clock: Any = SimpleNamespace(take=lambda: sum(clock.take() for clock in clocks))
        self._calibration: Calibration | None = None
        # Conditional confidences [S, B, N] and parents [B, N] of a merged draft.
        self._merged: tuple[Tensor, Tensor] | None = None

    @property
    def _holders(self) -> list[HoldsCache]:  # type: ignore[override]
        return [drafter for drafter in self.drafters if isinstance(drafter, HoldsCache)]

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        for drafter in self.drafters:
            drafter.begin(prompts, output, sampler, join=join)

    def catch_up(self) -> None:
        for drafter in self.drafters:
            if isinstance(drafter, CatchesUp):
                drafter.catch_up()

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Ask all of them, and keep the likeliest nodes."""
        drafts = self._ask(root, budget, sampler)
        present = [draft for draft in drafts if draft.num_nodes]
        self._merged = None
        if not present:
            return drafts[0]
        if len(present) == 1 and present[0].num_nodes <= self.max_nodes:
            return present[0]
        if self._calibration is None:
            self._calibration = Calibration(len(self.drafters), root.device)
        pool = reduce(join, map(pool_of, drafts))
        conditional = pool.confidence / pool.above(pool.confidence, 1.0).clamp(min=1e-9)
        acceptance = self._calibration.acceptance(conditional) if self.calibrate else conditional
        # Of every candidate's path, the log of its acceptance [B, M].
        scores = step = torch.where(pool.confidence > 0, acceptance, 0.0).amax(0).log()
        for _ in range(pool.depth - 1):
            scores = step + pool.above(scores, 0.0)
        scores = scores.masked_fill(~pool.real, float("-inf"))
        row_budgets = torch.tensor(budget, device=root.device)
        kept = best_first(scores, pool.parents, self.max_nodes, row_budgets)
        nodes = kept.nodes.clamp(min=0).expand(len(conditional), -1, -1)
        shown = conditional.gather(2, nodes).masked_fill(kept.nodes < 0, 0.0)
        self._merged = shown, kept.parents
        return selected(kept, pool.tokens, pool.depth)

    def _ask(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> list[Draft]:
        """Every drafter's draft, an empty one where it was not asked."""
        drafts = [Draft.empty(len(root), root.device)] * len(self.drafters)
        for source, drafter in enumerate(self.drafters):
            limits = [min(limit, drafter.max_nodes) for limit in budget]
            drafts[source] = drafter.propose(root, limits, sampler)
            if drafts[source].probs is not None:
                raise ValueError(
                    f"a hybrid cannot hold {type(drafter).__name__}, whose draft has probs: a "
                    "sampled tree may not be pruned; let it choose tokens and report probs=None"
                )
            expected = getattr(drafter, "expected", ())
            asked = [found for found, limit in zip(expected, budget, strict=False) if limit]
            if self.enough is not None and asked and min(asked) >= self.enough:
                break
        return drafts

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        """Let all of them know, and learn what their confidence was worth."""
        for drafter in self.drafters:
            drafter.observe(verdict, committed, hidden)
        if self._merged is None or not self.calibrate or self._calibration is None:
            return
        conditional, parents = self._merged
        num_nodes = parents.shape[1]
        # Column 0 is the root, which is always taken; the last one takes the padding's writes.
        taken = torch.zeros(len(parents), num_nodes + 2, dtype=torch.bool, device=parents.device)
        taken[:, 0] = True
        places = torch.where(verdict.path < 0, num_nodes + 1, verdict.path + 1)
        taken.scatter_(1, places, True)
        reached = taken.gather(1, parents + 1)
        self._calibration.add(conditional, reached & (conditional > 0), taken[:, 1:-1])

    def reorder(self, rows: Tensor) -> None:
        for drafter in self.drafters:
            drafter.reorder(rows)
        if self._merged is not None:
            self._merged = self._merged[0][:, rows], self._merged[1][rows]
