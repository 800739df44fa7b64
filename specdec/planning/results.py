"""The content of `plan.json`: what is written, what is read, and its JSON schema."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from specdec.bench.results import BenchProvenance, Interval, Record, Results, Whole
from specdec.checkpoints import TargetIdentity
from specdec.drafters.base import DraftShape
from specdec.planning.fit import LinearCost, NotNegative, PiecewiseLinear, Residuals


class PlannedWorkload(Record):
    """The prompts that are planned for."""

    prompts: Whole
    tokens: Whole
    """of the target's own answers, along which acceptance is worked out"""
    mean_context: NotNegative
    """tokens in the cache at the mean step, for which steps are predicted"""


class ForwardPoint(Record):
    """An isolated forward of the target."""

    batch_size: Whole
    new_tokens: Whole
    """a row, the root included"""
    context: Whole
    """tokens cached before"""
    is_tree: bool
    median_s: NotNegative
    spread_s: NotNegative
    """of the middle half of the repeats"""
    repeats: Whole


class ForwardFit(Record):
    """Forwards at one batch size."""

    chain: PiecewiseLinear
    tree_extra: LinearCost | None
    """what a tree mask adds; null where it was not measured"""


class PlainStep(Record):
    """A step of plain decoding in the loop."""

    target_ms: NotNegative
    other_ms: NotNegative
    wall_ms: NotNegative
    relative_error: NotNegative
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
    loop_over_isolated_forward: NotNegative
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
    """what did not fit into memory"""
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
    load_average: NotNegative
    """the median while points were measured"""


class StepMs(Record):
    """Milliseconds of the mean step by part."""

    draft: float
    target: float
    other: float
    wall: float


class Configuration(Record):
    """A configuration and its predicted speed."""

    name: str
    type: str
    """"plain" for plain decoding"""
    options: dict[str, Any]
    is_given: bool
    """an arm of the configuration, not one that the search thought of"""
    is_timed: bool
    """step_ms, and predicted_speedup with it, come from its own timed steps; otherwise from the
    fits. plain_step_ms is always timed, predicted_tau always worked out from acceptance"""
    batch_size: Whole
    predicted_tau: float
    predicted_tau_ci: Interval
    predicted_speedup: NotNegative
    """expected total seconds of plain decoding over its own"""
    predicted_speedup_ci: Interval
    """with the error of the costs"""
    step_ms: StepMs
    plain_step_ms: NotNegative


class ScheduledLength(Record):
    """A draft length that was compared for a batch size."""

    batch_size: Whole
    nodes: Whole
    predicted_tau: float
    predicted_speedup: NotNegative
    predicted_speedup_ci: Interval
    is_timed: bool = False
    """as in a configuration; false in plans of older versions"""


class Controller(Record):
    """The table from which the online controller decides."""

    drafter: str
    step_s: dict[int, dict[int, NotNegative]]
    """seconds of a whole step by batch size and nodes; 0 nodes is plain decoding"""


class Plan(Results):
    """Measurements and choice of `specdec plan`; costs.jsonl beside it holds every timed run."""

    FILE: ClassVar[str] = "plan.json"

    schema_: Literal["specdec-plan-1", "specdec-plan-2"] = Field(
        default="specdec-plan-2", alias="schema"
    )
    provenance: BenchProvenance
    target: TargetIdentity
    workload: PlannedWorkload
    costs: MeasuredCosts
    trust: Trust | None = None
    """null in plans of older versions"""
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
    """of the bench that runs the choice, as in bench.yaml"""

    @model_validator(mode="after")
    def _renew(self) -> Self:
        """Turn an old plan's mean of ratios into a ratio of totals; its costs' error is unknown."""
        if self.schema_ == "specdec-plan-1":
            for each in (*self.configurations, self.choice, *self.runners_up):
                ratio = each.plain_step_ms / each.step_ms.wall
                interval = each.predicted_tau_ci
                each.predicted_speedup = each.predicted_tau * ratio
                each.predicted_speedup_ci = interval and (interval[0] * ratio, interval[1] * ratio)
        return self
