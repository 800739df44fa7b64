"""The choice: acceptance times cost, a bounded search over shapes, and lengths by batch size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from specdec.analysis.predict import Expected
from specdec.common.stats import Interval
from specdec.planning.candidates import Candidate, largest_first
from specdec.planning.costs import Costs, Sizes, to_ms
from specdec.planning.results import Configuration, ScheduledLength, StepMs

NUM_RESAMPLES = 2000
# Predicted gain below which plain decoding is kept: noise must not decide.
MARGIN = 0.02
# A bound is believed to this share: a dynamic tree's reranking may drop what a smaller one kept.
SLACK = 0.03

Predicted = tuple[Candidate, Configuration]


@dataclass(frozen=True)
class Forecast:
    """Predicts the speed of candidates.

    Attributes:
        predict: acceptance of a drafter's options, which remembers what it was asked.
        seed: seed of the bootstrap.
    """

    costs: Costs
    predict: Callable[[Mapping[str, Any]], Expected]
    seed: int = 0

    def __call__(self, candidate: Candidate, batch_size: int) -> Configuration:
        """Total seconds of plain decoding over the candidate's own, all prompts together."""
        expected, plain = self.predict(candidate.arm), self.costs.plain[batch_size]
        sizes = _sizes(candidate, expected, batch_size)
        step, error = self.costs.step(candidate, batch_size, sizes)
        ratio = float(plain.sum() / step.sum())
        shown = ("name", "type", "options", "is_given")
        return Configuration(
            **{key: getattr(candidate, key) for key in shown},
            is_timed=self.costs.is_timed(candidate, batch_size),
            batch_size=batch_size,
            predicted_tau=expected.tau,
            predicted_tau_ci=expected.tau_interval(),
            predicted_speedup=expected.tau * ratio,
            predicted_speedup_ci=self._interval(expected, ratio, error),
            step_ms=StepMs(**to_ms(step)),
            plain_step_ms=to_ms(plain)["wall"],
        )

    def bound(self, candidate: Candidate, batch_size: int, larger: Candidate) -> float:
        """Speed that a candidate cannot pass: a larger draft's acceptance at its own cost."""
        if candidate.varies:
            return inf  # its cost depends on how much it drafts, which only a prediction tells
        expected = self.predict(larger.arm)
        # Near the end of a text drafts are cut, those of a small shape less than those of a large.
        share = expected.nodes_per_step / larger.shape.nodes if batch_size == 1 else 1.0
        sizes = _between(min(1.0, share) * candidate.shape.nodes, 0.0)
        step, _ = self.costs.step(candidate, batch_size, sizes)
        return float(expected.tau * self.costs.plain[batch_size].sum() / step.sum())

    def _interval(self, expected: Expected, ratio: float, error: float) -> Interval:
        """Each resample of the prompts at a cost that is off by `error`."""
        steps, tokens = np.array([expected.steps, expected.tokens], float)
        tokens, steps = tokens[steps > 0] - 1, steps[steps > 0]  # the first token is prefill's
        if len(steps) < 2:
            return None
        draw, off = np.random.default_rng(self.seed), np.random.default_rng(self.seed + 1)
        draws = draw.integers(0, len(steps), (NUM_RESAMPLES, len(steps)))
        ratios = ratio * np.exp(off.normal(0.0, error, NUM_RESAMPLES))
        speeds = tokens[draws].sum(1) / steps[draws].sum(1) * ratios
        low, high = np.quantile(speeds, [0.025, 0.975]).tolist()
        return low, high


def _sizes(candidate: Candidate, expected: Expected, batch_size: int) -> Sizes:
    """Shares of the steps by the nodes that they draft: all that the shape has, fewer, or none."""
    # A batch is padded to the largest draft of its rows.
    nodes = candidate.shape.nodes
    if batch_size > 1 and not candidate.varies:
        return {nodes: 1.0}
    mean = min(expected.nodes_per_step, nodes)
    # Steps that judge no token had nothing drafted.
    judged = sum(row[0] for row in expected.tested_at if row)
    empty = min(max(0.0, 1 - judged / max(sum(expected.steps), 1e-9)), 1 - mean / nodes)
    if empty >= 1:
        return {0: 1.0}
    empty_batch = empty**batch_size
    return _between(mean * (1 - empty_batch) / (1 - empty), empty_batch)


def _between(mean: float, empty: float) -> Sizes:
    """Sizes with this mean: none in a share `empty` of the steps, else as equal as can be."""
    if mean <= 0 or empty >= 1:
        return {0: 1.0}
    low, part = divmod(mean / (1 - empty), 1.0)
    sizes = {0: empty, int(low) + 1: (1 - empty) * part}
    sizes[int(low)] = sizes.get(int(low), 0.0) + (1 - empty) * (1 - part)
    return {nodes: share for nodes, share in sizes.items() if share > 0}


def search(
    forecast: Forecast,
    candidates: Sequence[Candidate],
    batch_size: int,
    wanted: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[Predicted]:
    """Predict whatever may be among the `wanted` fastest, and every given configuration.

    Predictions are dear: what is left out is too slow by the bounds that larger drafts set.
    """
    found: list[Predicted] = []
    # Candidates that are left, by place, and their bounds.
    order = sorted(range(len(candidates)), key=lambda i: largest_first(candidates[i].shape))
    bounds = dict.fromkeys(order, inf)
    while bounds:
        index = max(bounds, key=lambda i: (candidates[i].is_given, bounds[i]))
        candidate, bound = candidates[index], bounds.pop(index)
        speeds = sorted((each.predicted_speedup for _, each in found), reverse=True)
        if not candidate.is_given and len(speeds) >= wanted and bound < speeds[wanted - 1]:
            break
        progress(len(found), len(candidates), candidate.name)
        found.append((candidate, forecast(candidate, batch_size)))
        for i, bound in bounds.items():
            other = candidates[i]
            if candidate.drafter == other.drafter and candidate.shape.covers(other.shape):
                limit = forecast.bound(other, batch_size, candidate) * (1 + SLACK)
                bounds[i] = min(bound, limit)
    progress(len(candidates), len(candidates), "search")
    return sorted(
        found, key=lambda pair: (-pair[1].predicted_speedup, pair[0].shape.nodes, pair[0].name)
    )


def confirm(
    forecast: Forecast, ranked: Sequence[Predicted], batch_size: int, finalists: int
) -> list[Predicted]:
    """Rank the fastest again, whose own times the costs hold by now; the others follow as before.

    A fit flatters some of many configurations, and these look fastest: so the choice was timed.
    """
    again = [(candidate, forecast(candidate, batch_size)) for candidate, _ in ranked[:finalists]]
    return [*sorted(again, key=lambda pair: -pair[1].predicted_speedup), *ranked[finalists:]]


def schedule(
    forecast: Forecast, candidate: Candidate, batch_sizes: Sequence[int]
) -> tuple[dict[int, int], list[ScheduledLength], dict[int, dict[int, float]]]:
    """Choose a draft length for every batch size, for which the costs hold the drafter.

    Give the most nodes a row by batch size, every length that was compared, and seconds of a whole
    step by batch size and nodes; 0 nodes is plain decoding.
    """
    lengths: list[ScheduledLength] = []
    nodes, step_s = {}, {}
    for size in batch_sizes:
        row, step_s[size] = [], {0: float(forecast.costs.plain[size].sum())}
        for cut in candidate.cuts():
            shared = forecast(cut, size).model_dump(include=set(ScheduledLength.model_fields))
            row.append(ScheduledLength(nodes=cut.shape.nodes, **shared))
            step_s[size][cut.shape.nodes] = float(forecast.costs.full_step(cut, size).sum())
        # The choice of a plan was timed as it is, and has beaten its cuts already.
        best = row[-1] if row[-1].is_timed else max(row, key=lambda each: each.predicted_speedup)
        nodes[size] = best.nodes if best.predicted_speedup > 1 + MARGIN else 0
        lengths += row
    return nodes, lengths, step_s
