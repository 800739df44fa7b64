"""Acceptance times cost: the speed that a configuration is predicted to have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from specdec.analysis.expected import Expected
from specdec.common.stats import Interval
from specdec.planning.candidates import Candidate
from specdec.planning.costs import Costs, Sizes
from specdec.planning.results import Configuration, StepMs
from specdec.planning.times import StepTime

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Prediction:
    """A configuration's predicted speed.

    Attributes:
        tau: tokens a step.
        speedup: expected seconds of plain decoding over its own, all prompts together.
        speedup_ci: 95 % interval over prompts, with the error of the costs.
        step: seconds of the mean step.
        plain: seconds of a step of plain decoding.
        is_timed: its steps were timed as they are, not worked out from those of other shapes.
    """

    candidate: Candidate
    batch_size: int
    tau: float
    tau_ci: Interval
    speedup: float
    speedup_ci: Interval
    step: StepTime
    plain: StepTime
    is_timed: bool = False

    def described(self) -> Configuration:
        """The prediction as a plan holds it."""
        return Configuration(
            name=self.candidate.name,
            type=self.candidate.type,
            options=self.candidate.options,
            is_given=self.candidate.is_given,
            is_timed=self.is_timed,
            batch_size=self.batch_size,
            predicted_tau=self.tau,
            predicted_tau_ci=self.tau_ci,
            predicted_speedup=self.speedup,
            predicted_speedup_ci=self.speedup_ci,
            step_ms=StepMs(**self.step.ms()),
            plain_step_ms=1000 * self.plain.wall_s,
        )


class Acceptance:
    """Acceptance of candidates; each drafter's options are asked about once, for that is dear."""

    def __init__(self, predict: Callable[[Mapping[str, Any]], Expected]) -> None:
        self._predict = predict
        self._known: dict[str, Expected] = {}

    def __call__(self, candidate: Candidate) -> Expected:
        """The expected steps of a candidate."""
        if candidate.key not in self._known:
            options = {"type": candidate.type, **candidate.options}
            self._known[candidate.key] = self._predict(options)
        return self._known[candidate.key]


class Forecast:
    """Predicts configurations from costs and acceptance.

    Args:
        costs: measured costs of this machine.
        expected: acceptance of a candidate.
        context: tokens in the cache, the mean over the workload.
        seed: seed of the bootstrap.
    """

    def __init__(
        self,
        costs: Costs,
        expected: Callable[[Candidate], Expected],
        context: float,
        seed: int = 0,
    ) -> None:
        self.costs, self.expected, self.context, self.seed = costs, expected, context, seed

    def with_costs(self, costs: Costs) -> "Forecast":
        """The same acceptance at other costs."""
        return Forecast(costs, self.expected, self.context, self.seed)

    def __call__(self, candidate: Candidate, batch_size: int) -> Prediction:
        """The prediction of a candidate."""
        expected, plain = self.expected(candidate), self.plain(batch_size)
        sizes = _sizes(candidate, expected, batch_size)
        step = self.costs.step(candidate, batch_size, sizes, self.context)
        ratio = plain.wall_s / step.wall_s
        error = self.costs.uncertainty(candidate, batch_size)
        return Prediction(
            candidate,
            batch_size,
            expected.tau,
            expected.tau_interval(),
            float(expected.tau * ratio),
            _interval(expected, ratio, error, self.seed),
            step,
            plain,
            self.costs.is_timed(candidate, batch_size),
        )

    def bound(self, candidate: Candidate, batch_size: int, larger: Candidate) -> float:
        """Speed that a candidate cannot pass: a larger draft's acceptance at its own cost."""
        if candidate.varies:
            return inf  # its cost depends on how much it drafts, which only a prediction tells
        expected = self.expected(larger)
        # Near the end of a text drafts are cut, those of a small shape less than those of a large.
        share = 1.0
        if batch_size == 1:
            share = min(1.0, _mean_nodes(expected) / larger.shape.nodes)
        sizes = _between(share * candidate.shape.nodes, 0.0)
        step = self.costs.step(candidate, batch_size, sizes, self.context)
        return float(expected.tau) * self.plain(batch_size).wall_s / step.wall_s

    def full_step(self, candidate: Candidate, batch_size: int) -> StepTime:
        """A step that drafts all the nodes of a candidate."""
        return self.costs.full_step(candidate, batch_size, self.context)

    def plain(self, batch_size: int) -> StepTime:
        """A step of plain decoding."""
        return self.costs.plain[batch_size].time


def _sizes(candidate: Candidate, expected: Expected, batch_size: int) -> Sizes:
    """Shares of the steps by the nodes that they draft: all that the shape has, fewer, or none.

    A batch is padded to the largest draft of its rows, and drafts nothing where none of them does.
    """
    nodes = candidate.shape.nodes
    if batch_size > 1 and not candidate.varies:
        return {nodes: 1.0}
    mean = min(_mean_nodes(expected), nodes)
    # Steps that judge no token had nothing drafted.
    judged = sum(row[0] for row in expected.tested_at if row)
    empty = max(0.0, 1 - judged / max(sum(expected.steps), 1e-9))
    empty = min(empty, 1 - mean / nodes)
    if empty >= 1:
        return {0: 1.0}
    empty_batch = empty**batch_size
    return _between(mean * (1 - empty_batch) / (1 - empty), empty_batch)


def _mean_nodes(expected: Expected) -> float:
    return sum(expected.drafted) / max(sum(expected.steps), 1e-9)


def _between(mean: float, empty: float) -> Sizes:
    """Sizes with this mean: none in a share `empty` of the steps, in the others as equal as can be.

    A step's cost is close to linear in the nodes, all but the first.
    """
    if mean <= 0 or empty >= 1:
        return {0: 1.0}
    low, part = divmod(mean / (1 - empty), 1.0)
    sizes = {0: empty, int(low) + 1: (1 - empty) * part}
    sizes[int(low)] = sizes.get(int(low), 0.0) + (1 - empty) * (1 - part)
    return {nodes: share for nodes, share in sizes.items() if share > 0}


def _interval(expected: Expected, ratio: float, error: float, seed: int) -> Interval:
    """Interval of the speedup: each resample of the prompts at a cost that is off by `error`."""
    tokens, steps = np.array(expected.tokens, float), np.array(expected.steps, float)
    tokens, steps = tokens[steps > 0] - 1, steps[steps > 0]  # the first token is prefill's
    if len(steps) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(steps), (NUM_RESAMPLES, len(steps)))
    taus = tokens[draws].sum(1) / steps[draws].sum(1)
    off = np.random.default_rng(seed + 1).normal(0.0, error, NUM_RESAMPLES)
    low, high = np.quantile(taus * ratio * np.exp(off), [0.025, 0.975])
    return float(low), float(high)
