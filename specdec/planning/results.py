"""The content of `plan.json`: what is written, what is read, and its JSON schema."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from specdec.bench.results import BenchProvenance, Interval, Record, Results, Whole
from specdec.checkpoints import TargetIdentity
from specdec.drafters.base import DraftShape

Array = np.ndarray[Any, Any]


class PlannedWorkload(Record):
    """The prompts that are planned for."""

    prompts: Whole
    tokens: Whole
    """tokens of the target's own answers, along which acceptance is worked out"""
    mean_context: NonNegativeFloat
    """tokens in the cache at the mean step, for which steps are predicted"""


class Residuals(Record):
    """Errors of a fit, relative to the measured times."""

    median: NonNegativeFloat
    largest: NonNegativeFloat
    rms: NonNegativeFloat

    @classmethod
    def of(cls, measured: Array, fitted: Array, counts: Any = None) -> "Residuals":
        """Compare times [points] with fitted ones; the mean square weighs by `counts`."""
        relative = np.abs(fitted / measured - 1)
        return cls(
            median=float(np.median(relative)),
            largest=float(relative.max()),
            rms=float(np.sqrt(np.average(relative**2, weights=counts))),
        )


def bent(tokens: Array, context: Array, knots: Sequence[float]) -> Array:
    """Features [points, 4 + knots] of a piecewise linear forward."""
    bends = [np.maximum(0.0, tokens - knot) for knot in knots]
    return np.stack([np.ones_like(tokens), tokens, context, tokens * context, *bends], 1)


LINEAR = ("constant", "per_token", "per_context", "per_token_and_context")


class PiecewiseLinear(Record):
    """seconds = constant + per_token n + per_context c + per_token_and_context n c + the sum of
    slope_change max(0, n - knot), for n new tokens and c cached ones in a row."""

    constant: float
    per_token: float
    per_context: float
    per_token_and_context: float
    knots: list[float]
    slope_changes: list[float]
    residuals: Residuals

    def __call__(self, new_tokens: float, context: float) -> float:
        (row,) = bent(np.array([float(new_tokens)]), np.array([float(context)]), self.knots)
        return float(row @ [*(getattr(self, name) for name in LINEAR), *self.slope_changes])


class LinearCost(Record):
    """Seconds as a sum of parts, none of which makes a step cheaper."""

    coefficients: dict[str, NonNegativeFloat]
    """seconds for one of each feature"""
    residuals: Residuals

    def __call__(self, features: Sequence[float]) -> float:
        """Seconds for these features, in the order of the coefficients."""
        return float(np.dot(features, list(self.coefficients.values())))


class ForwardPoint(Record):
    """An isolated forward of the target."""

    batch_size: Whole
    new_tokens: Whole
    """a row, the root included"""
    context: Whole
    """tokens cached before"""
    is_tree: bool
    median_s: NonNegativeFloat
    spread_s: NonNegativeFloat
    """width of the middle half of the repeats"""
    repeats: Whole


class ForwardFit(Record):
    """Forwards at one batch size."""

    chain: PiecewiseLinear
    tree_extra: LinearCost | None
    """seconds that a tree mask adds; null where it was not measured"""

    def __call__(self, new_tokens: float, context: float, is_tree: bool) -> float:
        seconds = self.chain(new_tokens, context)
        if is_tree and self.tree_extra:
            seconds += self.tree_extra((1.0, new_tokens))
        return max(seconds, 1e-9)


class PlainStep(Record):
    """A step of plain decoding in the loop."""

    target_ms: NonNegativeFloat
    other_ms: NonNegativeFloat
    wall_ms: NonNegativeFloat
    relative_error: NonNegativeFloat
    """standard error over the moments it was measured at"""


class PartTime(Record):
    """One part of a step, as it was timed and as the fits have it."""

    measured_ms: float
    fitted_ms: float


class StepPoint(Record):
    """Steps of one shape that drafted as many nodes."""

    shape: DraftShape
    nodes: Whole
    """drafted in these steps"""
    context: float
    steps: Whole
    """number of them"""
    draft: PartTime
    target: PartTime
    other: PartTime
    wall: PartTime


class DrafterFit(Record):
    """Steps with one drafter at one batch size."""

    drafter: str
    batch_size: Whole
    points: list[StepPoint]
    loop_over_isolated_forward: NonNegativeFloat
    """median ratio of the target's forward in the loop to the isolated one"""
    draft: LinearCost
    target: LinearCost
    other: LinearCost
    residuals: Residuals


class MeasuredCosts(Record):
    """All that was measured, with the fits."""

    points: list[ForwardPoint]
    """isolated forwards of the target"""
    skipped: list[str]
    """points that did not fit into memory"""
    forward: dict[int, ForwardFit]
    """by batch size"""
    plain: dict[int, PlainStep]
    """by batch size"""
    drafters: list[DrafterFit]


class Trust(Record):
    """The verdict on the times: those of a quiet machine, or not to be trusted."""

    is_trusted: bool
    reasons: list[str]
    """why not; empty if trusted"""
    plain_step_ms_range: tuple[float, float]
    """10th and 90th percentile over the moments at which plain decoding was timed, at the planned
    batch size"""
    load_average: NonNegativeFloat
    """the median while points were measured"""


class StepMs(Record):
    """Milliseconds of the mean step by part."""

    draft: float
    target: float
    other: float
    wall: float


class PredictedSpeed(Record):
    """Acceptance times cost, at one batch size."""

    batch_size: Whole
    is_timed: bool
    """step times, and predicted_speedup with them, come from its own timed steps; otherwise from
    the fits. Plain steps are always timed, predicted_tau is always worked out from acceptance"""
    predicted_tau: float
    predicted_speedup: NonNegativeFloat
    """expected total seconds of plain decoding over its own"""
    predicted_speedup_ci: Interval
    """with the error of the costs"""


class Configuration(PredictedSpeed):
    """A configuration and its predicted speed."""

    name: str
    type: str
    """"plain" for plain decoding"""
    options: dict[str, Any]
    is_given: bool
    """an arm of the configuration, not one that the search thought of"""
    predicted_tau_ci: Interval
    step_ms: StepMs
    plain_step_ms: NonNegativeFloat


class ScheduledLength(PredictedSpeed):
    """A draft length that was compared for a batch size."""

    nodes: Whole


class Controller(Record):
    """The table from which the online controller decides."""

    drafter: str
    step_s: dict[int, dict[int, NonNegativeFloat]]
    """seconds of a whole step by batch size and nodes; 0 nodes is plain decoding"""


class Plan(Results):
    """Measurements and choice of `specdec plan`; costs.jsonl beside it holds every timed run."""

    FILE: ClassVar[str] = "plan.json"

    schema_: Literal["specdec-plan-2"] = Field(default="specdec-plan-2", alias="schema")
    provenance: BenchProvenance
    target: TargetIdentity
    workload: PlannedWorkload
    costs: MeasuredCosts
    trust: Trust | None
    """null where it was not judged"""
    configurations: list[Configuration]
    """all that were predicted: those that were timed as they are, the fastest first, then the
    others, the fastest by the fits first; of a searched drafter's other shapes none is among the
    twelve fastest by the fits (four with --quick)"""
    choice: Configuration
    """type "plain" where no drafter is predicted to gain more than 2 %"""
    runners_up: list[Configuration]
    schedule: dict[int, Whole]
    """nodes a row by batch size, with the controller's drafter; 0 is plain decoding"""
    schedule_predictions: list[ScheduledLength]
    controller: Controller
    config: dict[str, Any]
    """settings of the bench that runs the choice, as in bench.yaml"""
