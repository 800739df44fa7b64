"""The expected steps of the loop along texts.

Given the text that is emitted, the steps of the loop are a Markov chain along it: a step that
starts with s tokens done accepts a number of drafted tokens whose distribution depends on s alone.
So the expected number of steps follows from the probabilities that a step starts at each place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdec.analysis.teacher_forced import Array, Evidence
from specdec.common.stats import Interval, bootstrap_interval
from specdec.drafters.base import FixedShape
from specdec.engine.metrics import AcceptanceStats, StepRecord


@dataclass(frozen=True)
class Expected:
    """Expectations, one entry a text.

    Attributes:
        tokens: emitted tokens, T; these are certain.
        steps: verify steps.
        drafted: nodes verified.
        accepted_at: steps that accept at depth 1, 2, ...
        tested_at: steps that judge a token at depth 1, 2, ...
        drafted_is_exact: False where sampled chains end by a threshold: behind a rejection they
            are counted as though the text had gone on as drafted.
        prompt_of: number of each text's prompt; answers to one prompt are no independent texts.
            Empty where each has its own.
    """

    tokens: list[float]
    steps: list[float]
    drafted: list[float]
    accepted_at: list[list[float]]
    tested_at: list[list[float]]
    drafted_is_exact: bool = True
    prompt_of: Sequence[int] = ()

    @property
    def tau(self) -> float:
        """Accepted length, 1 + A / S; 1.0 if there is no step."""
        steps = sum(self.steps)
        return float(1 + self._accepted().sum() / steps) if steps else 1.0

    def tau_interval(self) -> Interval:
        """95 % of tau by bootstrap over the prompts that have a step; None for fewer than two."""
        accepted = by_prompt(self._accepted(), self.prompt_of)
        steps = by_prompt(np.array(self.steps), self.prompt_of)
        has_step = steps > 0
        return bootstrap_interval(
            (accepted[has_step], steps[has_step]),
            lambda a, s, axis: 1 + a.sum(axis=axis) / s.sum(axis=axis),
        )

    @property
    def nodes_per_step(self) -> float:
        """D / S; 0.0 if there is no step."""
        steps = sum(self.steps)
        return sum(self.drafted) / steps if steps else 0.0

    @cached_property
    def conditional_acceptance_at_depth(self) -> tuple[float | None, ...]:
        """Accepted over tested at depth 1, 2, ...; None where none is tested."""
        accepted, tested = (np.sum(part, 0) for part in (self.accepted_at, self.tested_at))
        pairs = zip(np.atleast_1d(accepted), np.atleast_1d(tested), strict=True)
        return tuple(min(1.0, float(a / t)) if t > 1e-9 else None for a, t in pairs)

    def _accepted(self) -> Array:
        # T - 1 = A + S, as in `specdec.engine.metrics`.
        accepted: Array = np.array(self.tokens) - 1 - np.array(self.steps)
        return accepted

    @classmethod
    def from_records(cls, rows: Sequence[Sequence[StepRecord]]) -> "Expected":
        """Add up certain steps, one sequence of records a text."""
        stats = [AcceptanceStats.from_records(row) for row in rows]
        depth = max((len(each.tested_at) for each in stats), default=0)

        def padded(counts: Sequence[int]) -> list[float]:
            return [*map(float, counts), *[0.0] * (depth - len(counts))]

        return cls(
            tokens=[1.0 + each.num_accepted + each.num_steps for each in stats],
            steps=[float(each.num_steps) for each in stats],
            drafted=[float(each.num_drafted) for each in stats],
            accepted_at=[padded(each.accepted_at) for each in stats],
            tested_at=[padded(each.tested_at) for each in stats],
        )


def by_prompt(values: Array, prompt_of: Sequence[int]) -> Array:
    """Sums over the texts of each prompt, for intervals over prompts."""
    return np.bincount(prompt_of, weights=values) if len(prompt_of) else values


def expect(evidence: Evidence, shape: FixedShape, *, sampled: bool) -> Expected:
    """The expected steps with a draft of a fixed shape, under the token rule."""
    starts = np.arange(1, evidence.rank.shape[1] + 1)  # tokens done
    left = np.clip(evidence.num_tokens[:, None] - starts, 0, None)  # [B, S]
    num_nodes = len(shape.tree.parents)
    # As `Request.budget`: the nodes that can still be kept, beside the step's own token.
    budget = np.clip(evidence.max_tokens[:, None] - starts - 1, 0, num_nodes)
    levels = _levels_drafted(evidence, shape)
    at_least, tested = _reach(evidence, shape, budget, levels, sampled)
    depths = np.arange(at_least.shape[2])
    # The last token of a text counts as its step's own, whoever found it.
    at_least = np.where(depths <= left[..., None] - 1, at_least, 0.0)
    at_least[..., 0] = left > 0
    tested = np.where(depths[1:] <= left[..., None], tested, 0.0)
    visits = _visits(at_least)  # [B, S]
    drafted = np.minimum(budget, num_nodes if levels is None else levels)
    return Expected(
        tokens=[float(count) for count in evidence.num_tokens],
        steps=visits.sum(1).tolist(),
        drafted=(visits * drafted).sum(1).tolist(),
        accepted_at=(visits[..., None] * at_least[..., 1:]).sum(1).tolist(),
        tested_at=(visits[..., None] * tested).sum(1).tolist(),
        drafted_is_exact=not shape.threshold,
    )


def first_acceptance(evidence: Evidence, shape: FixedShape, *, sampled: bool) -> Array:
    """Probability [B, S] that a step that starts there accepts a token; 0 behind a text's end.

    The budget at a text's end is ignored, as though the text went on.
    """
    budget = np.full(evidence.rank.shape[:2], len(shape.tree.parents))
    at_least, _ = _reach(evidence, shape, budget, _levels_drafted(evidence, shape), sampled)
    accepted: Array = np.where(evidence.valid[:, :, 0], at_least[..., 1], 0.0)
    return accepted


def _levels_drafted(evidence: Evidence, shape: FixedShape) -> Array | None:
    """Levels [B, S] that a threshold leaves of a chain; None without one."""
    if not shape.threshold:
        return None
    survival = np.cumprod(evidence.confidence.astype(np.float64), 2)
    drafted: Array = (survival >= shape.threshold).sum(2)
    return drafted


def _reach(
    evidence: Evidence, shape: FixedShape, budget: Array, levels: Array | None, sampled: bool
) -> tuple[Array, Array]:
    """Probabilities that a step accepts at least d tokens [B, S, D + 1], and tests depth d."""
    tree = shape.tree
    at_least = np.zeros((*budget.shape, tree.depth + 1))
    tested = np.zeros((*budget.shape, tree.depth))
    at_least[..., 0] = 1.0
    reached = [np.ones(budget.shape)]  # of the root, then of every node
    has_child: set[int] = set()
    nodes = zip(tree.parents.tolist(), tree.ranks.tolist(), tree.depths.tolist(), strict=True)
    for node, (parent, rank, depth) in enumerate(nodes, 1):
        kept = node <= budget
        if levels is not None:
            kept = kept & (depth <= levels)
        above = reached[parent + 1] * kept
        if parent not in has_child:
            # Of a node's children the first is the last to fall to a budget.
            tested[..., depth - 1] += above
            has_child.add(parent)
        reached.append(above * _taken(evidence, depth - 1, rank, sampled))
        at_least[..., depth] += reached[-1]
    return at_least, tested


def _taken(evidence: Evidence, level: int, rank: int, sampled: bool) -> Array | float:
    """Probability [B, S] that the child of this rank is the accepted one."""
    if level >= evidence.depth:
        return 0.0
    if sampled:
        chances: Array = evidence.accept[:, :, level, rank].astype(np.float64)
        return chances
    is_it: Array = (evidence.rank[:, :, level] == rank) & evidence.valid[:, :, level]
    return is_it.astype(np.float64)


def _visits(at_least: Array) -> Array:
    """Probability [B, S] that a step starts at each place."""
    num_rows, num_steps, size = at_least.shape
    exactly = at_least.copy()
    exactly[..., :-1] -= at_least[..., 1:]
    visits = np.zeros((num_rows, num_steps + size))
    visits[:, 0] = at_least[:, 0, 0]
    for start in range(num_steps):
        # Behind `a` accepted tokens and the step's own the next one starts.
        visits[:, start + 1 : start + 1 + size] += visits[:, start, None] * exactly[:, start]
    found: Array = visits[:, :num_steps] * (at_least[..., 0] > 0)
    return found


def coverage(evidence: Evidence, width: int = 10) -> list[list[float]]:
    """Share of places where the text takes the candidate of each rank, by depth: [depth][rank].

    At a depth those places count where it took one of the first `width` candidates at every depth
    above, as `best_static_tree` expects. Depths without a place are left out.
    """
    counted = evidence.valid.copy()
    table = []
    for level in range(evidence.depth):
        reached: Array = counted[:, :, level]
        num_places = int(reached.sum())
        if not num_places:
            break
        ranks = evidence.rank[:, :, level][reached]
        hits = np.bincount(ranks[ranks < width], minlength=width)
        table.append([round(float(share), 6) for share in hits / num_places])
        if level + 1 < evidence.depth:
            counted[:, :, level + 1] &= reached & (evidence.rank[:, :, level] < width)
    return table
