"""Several drafters as one: their trees merged under one node budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.calibration import Calibration
from specdec.drafters.merging import Pool, merge_drafts
from specdec.interfaces import Drafter, HoldsCache, Prompts, TargetOutput
from specdec.sampling import Sampler
from specdec.sampling_config import require_counts
from specdec.verify import Draft, Verdict, best_first


class HybridDrafter:
    """Merges the drafts of two or more drafters, equal paths joined, the likeliest nodes kept.

    How likely a node is, is its drafter's confidence, corrected by how often such nodes were
    accepted so far; of several drafters that propose it, the most confident counts. The corrections
    are shared by all rows and outlive them: past outputs change what is drafted, never what is
    emitted.

    Args:
        drafters: what to merge; lookups first, then neural ones. Their tokens must be chosen, not
            sampled.
        max_nodes: node budget of the merged tree.
        enough: accepted tokens that a lookup must expect in every row for the drafters behind it
            not to be asked at all in this step; None asks all of them every time.
        calibrate: correct the confidences; False takes them as they are.
    """

    makes_trees = True

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
            _refuse_what_cannot_merge(drafter)
        self.drafters = list(drafters)
        self.max_nodes, self.enough, self.calibrate = max_nodes, enough, calibrate
        self.taps = tuple(sorted({tap for drafter in drafters for tap in drafter.taps}))
        self.clock = _SumClock(drafters)
        self._calibration: Calibration | None = None
        # Conditional confidences [S, B, N] and parents [B, N] of a merged draft.
        self._merged: tuple[Tensor, Tensor] | None = None

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Let all of them begin."""
        for drafter in self.drafters:
            drafter.begin(prompts, output, sampler, join=join)

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Ask all of them, and keep the likeliest nodes."""
        drafts = self._ask(root, budget, sampler)
        present = [source for source, draft in enumerate(drafts) if draft.num_nodes]
        self._merged = None
        if not present:
            return drafts[0]
        only = drafts[present[0]]
        if len(present) == 1 and only.num_nodes <= self.max_nodes:
            return only
        if self._calibration is None:
            self._calibration = Calibration(len(self.drafters), root.device)
        pool = merge_drafts(drafts)
        conditional = pool.confidence / pool.above(pool.confidence, 1.0).clamp(min=1e-9)
        kept = best_first(
            self._scores(pool, conditional),
            pool.parents,
            self.max_nodes,
            torch.tensor(budget, device=root.device),
        )
        nodes = kept.nodes.clamp(min=0)
        shown = conditional.gather(2, nodes.expand(len(conditional), -1, -1))
        self._merged = (shown.masked_fill(kept.nodes < 0, 0.0), kept.parents)
        tokens = pool.tokens.gather(1, nodes).masked_fill(kept.nodes < 0, -1)
        return Draft.tree(tokens, kept.parents, kept.lengths, pool.depth)

    def _ask(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> list[Draft]:
        """Every drafter's draft, an empty one where it was not asked."""
        drafts: list[Draft] = []
        for drafter in self.drafters:
            limits = [min(limit, drafter.max_nodes) for limit in budget]
            drafts.append(drafter.propose(root, limits, sampler))
            if drafts[-1].probs is not None:
                raise ValueError(
                    f"a hybrid cannot hold {type(drafter).__name__}, whose draft has probs: a "
                    "sampled tree may not be pruned; let it choose tokens and report probs=None"
                )
            expected = getattr(drafter, "expected", None)
            if expected and self._is_enough(expected, budget):
                break
        missing = len(self.drafters) - len(drafts)
        return [*drafts, *[Draft.empty(len(root), root.device)] * missing]

    def _is_enough(self, expected: Sequence[float], budget: Sequence[int]) -> bool:
        if self.enough is None:
            return False
        asked = [found for found, limit in zip(expected, budget, strict=True) if limit]
        return bool(asked) and min(asked) >= self.enough

    def _scores(self, pool: Pool, conditional: Tensor) -> Tensor:
        """Logs of the estimated acceptance of every candidate's path [B, M], -inf for no one."""
        assert self._calibration is not None
        estimated = self._calibration.acceptance(conditional) if self.calibrate else conditional
        best = torch.where(pool.confidence > 0, estimated, 0.0).amax(0)
        step = best.log()
        scores = step
        for _ in range(pool.depth - 1):
            scores = step + pool.above(scores, 0.0)
        return scores.masked_fill(~pool.real, float("-inf"))

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
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
        """Let all of them keep these rows."""
        for drafter in self.drafters:
            drafter.reorder(rows)

    @property
    def _caching(self) -> list[HoldsCache]:
        return [drafter for drafter in self.drafters if isinstance(drafter, HoldsCache)]

    @property
    def cache_bytes(self) -> int:
        """See `HoldsCache`."""
        return sum(drafter.cache_bytes for drafter in self._caching)

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """See `HoldsCache`."""
        return sum(drafter.bytes_for(num_rows, num_slots) for drafter in self._caching)

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """See `HoldsCache`."""
        for drafter in self._caching:
            drafter.reserve(num_rows, num_slots, join=join)

    def wipe(self, rows: Sequence[int]) -> None:
        """See `HoldsCache`."""
        for drafter in self._caching:
            drafter.wipe(rows)


def _refuse_what_cannot_merge(drafter: Drafter) -> None:
    children = getattr(getattr(drafter, "shape", None), "children", "top")
    if children != "top":
        raise ValueError(
            f"a hybrid cannot hold children={children!r}: a sampled tree may not be pruned; "
            "use children=top"
        )
    if getattr(drafter, "caches_draft", False):
        raise ValueError(
            "a hybrid cannot hold a draft model that drafts chains: it keeps the accepted part of "
            "its own draft in its cache; use width=2 or more"
        )


class _SumClock:
    """The forwards of all drafters."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._clocks = [drafter.clock for drafter in drafters]

    def take(self) -> float:
        """Seconds since the last call."""
        return sum(clock.take() for clock in self._clocks)
