"""The expected steps of the loop along texts, for any drafter: from one pass, or from a replay.

Given the text that is emitted, the steps of the loop are a Markov chain along it: a step that
starts with s tokens done accepts a number of drafted tokens whose distribution depends on s alone.
So the expected number of steps follows from the probabilities that a step starts at each place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specdec.analysis.replay import Watch, replay
from specdec.analysis.teacher_forced import Array, Evidence, gather_evidence
from specdec.analysis.texts import Text, check_texts
from specdec.common.stats import Interval, bootstrap_interval
from specdec.drafters.base import FixedShape, Forced, padded
from specdec.engine.interfaces import Target
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.verify import get_rule
from specdec.verify.tree import StaticTree

# A pass looks at least this deep and wide, so that one serves many shapes.
MIN_DEPTH, MIN_SIBLINGS = 10, 4


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
        prompt_of: number of each text's prompt, for intervals; empty where each has its own.
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
        """Accepted length, 1 + A / S; 1.0 if there is no step. T - 1 is A + S."""
        steps = sum(self.steps)
        return (sum(self.tokens) - len(self.tokens)) / steps if steps else 1.0

    def tau_interval(self) -> Interval:
        return ratio_interval(np.array(self.tokens) - 1, np.array(self.steps), self.prompt_of)

    @property
    def nodes_per_step(self) -> float:
        """D / S; 0.0 if there is no step."""
        steps = sum(self.steps)
        return sum(self.drafted) / steps if steps else 0.0

    @property
    def conditional_acceptance_at_depth(self) -> list[float | None]:
        """Accepted over tested at depth 1, 2, ...; None where none is tested."""
        sums = zip(np.sum(self.accepted_at, 0), np.sum(self.tested_at, 0), strict=True)
        return [min(1.0, float(a / t)) if t > 1e-9 else None for a, t in sums]

    def figures(self) -> dict[str, Any]:
        """The fields of `results.ExpectedFigures`."""
        return {
            "tau": self.tau,
            "tau_ci": self.tau_interval(),
            "nodes_per_step": self.nodes_per_step,
            "nodes_are_exact": self.drafted_is_exact,
        }

    @classmethod
    def from_records(cls, rows: Sequence[Sequence[StepRecord]]) -> "Expected":
        """Add up certain steps, one sequence of records a text."""
        stats = [AcceptanceStats.from_records(row) for row in rows]
        return cls(
            tokens=[1.0 + each.num_accepted + each.num_steps for each in stats],
            steps=[each.num_steps for each in stats],
            drafted=[each.num_drafted for each in stats],
            accepted_at=padded([each.accepted_at for each in stats], 0.0),
            tested_at=padded([each.tested_at for each in stats], 0.0),
        )


def ratio_interval(over: Array, under: Array, prompt_of: Sequence[int]) -> Interval:
    """95 % of a ratio of sums over texts, by bootstrap over the prompts that have any."""
    if len(prompt_of):
        over, under = (np.bincount(prompt_of, weights=each) for each in (over, under))
    some = under > 0
    return bootstrap_interval(
        (over[some], under[some]), lambda o, u, axis: o.sum(axis=axis) / u.sum(axis=axis)
    )


def expect(evidence: Evidence, shape: FixedShape, *, sampled: bool) -> Expected:
    """The expected steps with a draft of a fixed shape, under the token rule."""
    starts = np.arange(1, evidence.rank.shape[1] + 1)  # tokens done
    left = np.clip(evidence.num_tokens[:, None] - starts, 0, None)  # [B, S]
    # As `Request.budget`: the nodes that can still be kept, beside the step's own token.
    budget = np.clip(evidence.max_tokens[:, None] - starts - 1, 0, _drafted(evidence, shape))
    at_least, tested = _reach(evidence, shape.tree, budget, sampled)
    depths = np.arange(at_least.shape[2])
    # The last token of a text counts as its step's own, whoever found it.
    at_least = np.where(depths < left[..., None], at_least, 0.0)
    tested = np.where(depths[1:] <= left[..., None], tested, 0.0)
    exactly = -np.diff(at_least, append=0.0)
    visits = np.zeros((len(left), len(starts) + len(depths)))  # chances that a step starts there
    visits[:, 0] = left[:, 0] > 0
    for start in range(len(starts)):
        # Behind `a` accepted tokens and the step's own the next one starts.
        behind = slice(start + 1, start + 1 + len(depths))
        visits[:, behind] += visits[:, start, None] * exactly[:, start]
    visits = visits[:, : len(starts)] * (left > 0)
    return Expected(
        tokens=[float(count) for count in evidence.num_tokens],
        steps=visits.sum(1).tolist(),
        drafted=(visits * budget).sum(1).tolist(),
        accepted_at=(visits[..., None] * at_least[..., 1:]).sum(1).tolist(),
        tested_at=(visits[..., None] * tested).sum(1).tolist(),
        drafted_is_exact=not shape.threshold,
    )


def first_acceptance(evidence: Evidence, shape: FixedShape, *, sampled: bool) -> Array:
    """Probability [B, S] that a step that starts there accepts a token; 0 behind a text's end.

    The budget at a text's end is ignored, as though the text went on.
    """
    at_least, _ = _reach(evidence, shape.tree, _drafted(evidence, shape), sampled)
    return np.where(evidence.valid[:, :, 0], at_least[..., 1], 0.0)


def _drafted(evidence: Evidence, shape: FixedShape) -> Array:
    """Nodes [B, S] of a draft, those of a chain that its threshold leaves."""
    nodes = np.full(evidence.rank.shape[:2], len(shape.tree.parents))
    if not shape.threshold:
        return nodes
    survival = np.cumprod(evidence.confidence.astype(np.float64), 2)
    return np.minimum(nodes, (survival >= shape.threshold).sum(2))


def _reach(
    evidence: Evidence, tree: StaticTree, budget: Array, sampled: bool
) -> tuple[Array, Array]:
    """Probabilities that a step accepts at least d tokens [B, S, D + 1], and tests depth d."""
    at_least = np.zeros((*budget.shape, tree.depth + 1))
    tested = np.zeros((*budget.shape, tree.depth))
    at_least[..., 0] = 1.0
    reached, valid = [at_least[..., 0]], evidence.valid  # of the root, then of every node
    parents = tree.parents.tolist()
    nodes = zip(parents, tree.ranks.tolist(), (tree.depths - 1).tolist(), strict=True)
    for node, (parent, rank, level) in enumerate(nodes):
        above = reached[parent + 1] * (node < budget)
        if parent not in parents[:node]:
            # Of a node's children the first is the last to fall to a budget.
            tested[..., level] += above
        taken: Array | float = 0.0  # what the drafter does not draft
        if level < evidence.depth and sampled:
            taken = evidence.accept[:, :, level, rank]
        elif level < evidence.depth:
            taken = (evidence.rank[:, :, level] == rank) & valid[:, :, level]
        reached.append(above * taken)
        at_least[..., level + 1] += reached[-1]
    return at_least, tested


def coverage(evidence: Evidence, width: int = 10) -> list[list[float]]:
    """Share of places where the text takes the candidate of each rank, by depth: [depth][rank].

    At a depth those places count where it took one of the first `width` candidates at every depth
    above, as `best_static_tree` expects.
    """
    valid = evidence.valid
    table, taken = [], valid[:, :, 0]
    for level in range(evidence.depth):
        reached, ranks = valid[:, :, level] & taken, evidence.rank[:, :, level]
        if not reached.any():
            break
        taken = reached & (ranks < width)
        hits = np.bincount(ranks[taken], minlength=width)
        table.append([round(float(share), 6) for share in hits / reached.sum()])
    return table


class Predictor:
    """Predicts acceptance along texts, and remembers what it was asked.

    A drafter with what `Forced` asks for, and a draft of a fixed shape, is looked at once: other
    shapes of it cost no model at all. Every other drafter is replayed, text i with seed + i.
    """

    def __init__(
        self,
        target: Target,
        texts: Sequence[Text],
        sampling: SamplingConfig,
        seed: int = 0,
        rule: str = "token",
    ) -> None:
        check_texts(texts, target)
        check_settings(sampling, rule)
        self.target, self.texts = target, list(texts)
        prompts: dict[tuple[int, ...], int] = {}
        self.prompt_of = [prompts.setdefault(tuple(t.prompt), len(prompts)) for t in texts]
        self.sampling, self.seed, self.rule = sampling, seed, rule
        self._passes: dict[str, tuple[tuple[int, int], Evidence]] = {}
        self._predicted: dict[str, Expected] = {}

    def predict(self, options: Mapping[str, Any]) -> Expected:
        """The expected steps of a drafter, by its options for `load_drafter`."""
        key = _key(options)
        if key not in self._predicted:
            drafter: Any = load_drafter(options, self.target)
            shape = drafter.fixed_shape if isinstance(drafter, Forced) else None
            found = self.expect(options, drafter, shape) if shape else self.replayed(drafter)
            self._predicted[key] = found
        return self._predicted[key]

    def expect(self, options: Mapping[str, Any], drafter: Any, shape: FixedShape) -> Expected:
        """The expected steps of a drafter, loaded with these options, in any fixed shape."""
        if reason := self.why_unknown(shape):
            raise ValueError(reason)
        evidence = self.evidence(options, drafter, shape)
        found = expect(evidence, shape, sampled=self.is_sampled(shape))
        return replace(found, prompt_of=self.prompt_of)

    def replayed(self, drafter: Any, watch: Watch = lambda *step: None) -> Expected:
        """The certain steps of a fresh drafter along the texts."""
        rows = replay(self.target, drafter, self.texts, self.sampling, self.seed, watch)
        return replace(Expected.from_records(rows), prompt_of=self.prompt_of)

    def is_sampled(self, shape: FixedShape) -> bool:
        """Tell if a draft's tokens are drawn from a distribution, at these settings."""
        return not self.sampling.is_greedy and shape.children != "top"

    def why_unknown(self, shape: FixedShape) -> str | None:
        """The reason why a shape's acceptance is not worked out at these settings, or None."""
        if not self.is_sampled(shape):
            return None
        if self.rule != "token":
            return (
                f"rule is {self.rule!r}: above temperature 0 the acceptance of sampled drafts is "
                "worked out for rule 'token' only; use it, or drafts of chosen tokens"
            )
        if shape.children == "without_replacement" and shape.tree.ranks.max() > 0:
            return (
                "children is 'without_replacement': above temperature 0 acceptance of such "
                "siblings depends on what was drawn; use children=with_replacement or top"
            )
        return None

    def evidence(
        self, options: Mapping[str, Any], drafter: Any, shape: FixedShape | None = None
    ) -> Evidence:
        """The pass behind the predictions of a drafter and of all its shapes, this one at least."""
        key = _key({k: v for k, v in options.items() if k not in drafter.shape_options.all})
        # What was asked for, as a drafter that is bound to fewer levels answers with all it has.
        start = MIN_DEPTH, 1 if self.sampling.is_greedy else MIN_SIBLINGS
        before, known = self._passes.get(key, (start, None))
        depth, num_siblings = before
        if shape is not None and self.why_unknown(shape) is None:
            depth = max(depth, shape.tree.depth)
            if self.is_sampled(shape):
                num_siblings = max(num_siblings, int(shape.tree.ranks.max()) + 1)
        if known is None or (depth, num_siblings) != before:
            asked = depth, num_siblings
            known = gather_evidence(self.target, drafter, self.texts, self.sampling, *asked)
            self._passes[key] = asked, known
        return known


def _key(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=str)


def check_settings(sampling: SamplingConfig, rule: str) -> None:
    """Refuse penalties and the like, and above temperature 0 rules that are not worked out."""
    if not sampling.is_plain:
        raise ValueError(
            "sampling has penalties, a bias, bad words or min_new_tokens, with which acceptance "
            "depends on what was emitted; leave them out, or measure with specdec bench"
        )
    if get_rule(rule).name not in ("token", "match") and not sampling.is_greedy:
        raise ValueError(
            f"rule is {rule!r}: above temperature 0 acceptance is worked out for rule 'token' (and "
            "'match' with drafts of chosen tokens); use it, or measure with specdec bench"
        )
