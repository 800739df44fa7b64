"""Which nodes a drafted tree has: chosen while it grows, or fixed beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from specdec.drafters.pool import CandidatePool
from specdec.drafters.static_growth import CHILDREN, StaticGrowth, StaticPlan, plan_levels
from specdec.sampling import Sampler
from specdec.sampling_config import require_counts
from specdec.verify import Draft
from specdec.verify.tree import best_static_tree, from_choices


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
