"""What a step costs on this machine, as one function of all that was measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from specdec.planning.candidates import Candidate, Shape
from specdec.planning.fit import (
    LinearCost,
    PiecewiseLinear,
    Residuals,
    fit_linear,
    fit_piecewise,
    median_polish,
)
from specdec.planning.times import TRIMMED, Step, StepTime, TimedRun, mean_step


@dataclass(frozen=True)
class ForwardPoint:
    """A measured forward.

    Attributes:
        batch_size: rows.
        new_tokens: a row.
        context: tokens cached before.
        is_tree: with a tree mask.
        median_s: over the repeats.
        spread_s: the middle half of the repeats.
        repeats: their number.
    """

    batch_size: int
    new_tokens: int
    context: int
    is_tree: bool
    median_s: float
    spread_s: float
    repeats: int


def forward_points(cells: Iterable[Mapping[str, Any]]) -> list[ForwardPoint]:
    """Medians over the repeats of timed cells {"batch", "context", "chain", "tree"}."""
    found: dict[tuple[int, int, int, bool], list[float]] = {}
    for cell in cells:
        for kind in ("chain", "tree"):
            for count, seconds in cell.get(kind, {}).items():
                key = (cell["batch"], int(count), cell["context"], kind == "tree")
                found.setdefault(key, []).append(seconds)
    return [ForwardPoint(*key, *_median_and_spread(times)) for key, times in sorted(found.items())]


def _median_and_spread(times: Sequence[float]) -> tuple[float, float, int]:
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float(middle), float(high - low), len(times)


class ForwardCost:
    """Seconds of a target forward, between the measured batches by linear interpolation.

    Args:
        points: see `forward_points`.

    Raises:
        ValueError: no points.
    """

    def __init__(self, points: Sequence[ForwardPoint]) -> None:
        if not points:
            raise ValueError(
                "no target forward was timed, nothing fitted into memory; use a smaller target, "
                "dtype or batch"
            )
        self._chains: dict[int, PiecewiseLinear] = {}
        self._trees: dict[int, LinearCost] = {}
        for batch in sorted({p.batch_size for p in points}):
            here = [p for p in points if p.batch_size == batch]
            self._chains[batch] = _fit([p for p in here if not p.is_tree])
            trees = [p for p in here if p.is_tree]
            if trees:
                self._trees[batch] = _fit_trees(trees, self._chains[batch])

    @property
    def batch_sizes(self) -> list[int]:
        """Those measured, in order."""
        return list(self._chains)

    def __call__(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        """Seconds of a forward over `new_tokens` in each of `batch_size` rows."""
        sizes = np.array(self.batch_sizes, float)
        times = [self._at(size, new_tokens, context, is_tree) for size in self.batch_sizes]
        if batch_size > sizes[-1]:
            return times[-1] * batch_size / float(sizes[-1])
        return float(np.interp(batch_size, sizes, times))

    def _at(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        seconds = self._chains[batch_size](new_tokens, context)
        if is_tree and batch_size in self._trees:
            seconds += self._trees[batch_size]((1.0, new_tokens))
        return max(seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """The fits by batch size."""
        return {
            str(batch): {
                "chain": fit.to_json(),
                "tree_extra": self._trees[batch].to_json() if batch in self._trees else None,
            }
            for batch, fit in self._chains.items()
        }


def _fit(points: Sequence[ForwardPoint]) -> PiecewiseLinear:
    return fit_piecewise(
        [p.new_tokens for p in points],
        [p.context for p in points],
        [p.median_s for p in points],
    )


def _fit_trees(points: Sequence[ForwardPoint], chains: PiecewiseLinear) -> LinearCost:
    """What a tree mask adds; what noise makes it save is no law."""
    extra = [p.median_s - chains(p.new_tokens, p.context) for p in points]
    rows = [(1.0, p.new_tokens) for p in points]
    return fit_linear(("tree", "token"), rows, extra, [p.median_s for p in points])


# Drafted nodes of a step and how often: {nodes: share}.
Sizes = Mapping[int, float]


DRAFT_FEATURES = ("step", "level", "fed_node", "drafted", "node", "root_of_nodes")
OTHER_FEATURES = ("step", "drafted", "level", "candidate", "node", "tree")


def _levels(shape: Shape, nodes: int) -> int:
    """Forwards of the drafter: a chain that a threshold ends has looked one token further."""
    return min(nodes + 1 if shape.threshold else nodes, shape.depth)


def _draft_row(shape: Shape, nodes: int) -> tuple[float, ...]:
    levels = _levels(shape, nodes)
    if shape.depth:
        more = max(levels - 1, 0)
        return (float(levels > 0), more, more * shape.width, 0.0, 0.0, 0.0)
    return (1.0, 0.0, 0.0, float(nodes > 0), nodes, nodes**0.5)


def _other_row(shape: Shape, nodes: int) -> tuple[float, ...]:
    levels = _levels(shape, nodes)
    is_tree = float(shape.is_tree and nodes > 0)
    return (1.0, float(nodes > 0), levels, levels * shape.width * is_tree, nodes, is_tree)


@dataclass(frozen=True)
class _Group:
    """Steps of one shape that drafted as many nodes."""

    shape: Shape
    nodes: int
    context: float
    time: StepTime
    count: int


class DrafterCost:
    """A step with one drafter at one batch size, for any of its shapes.

    Args:
        runs: timed decodings with it.
        plain_s: seconds of a plain step, which the runs' times are brought to: each run is
            compared with the plain ones of its own moment.
        batch_size: of the runs.
        forward: the target's forwards.
    """

    def __init__(
        self, runs: Sequence[TimedRun], plain_s: float, batch_size: int, forward: ForwardCost
    ) -> None:
        self._forward, self._batch_size = forward, batch_size
        groups = _groups(runs, plain_s)
        expected = [forward(batch_size, g.nodes + 1, g.context, _is_tree(g)) for g in groups]
        target_rows = [(seconds, 1.0) for seconds in expected]
        self._target = _fit_part("target_s", ("forward", "step"), target_rows, groups)
        draft_rows = [_draft_row(g.shape, g.nodes) for g in groups]
        self._draft = _fit_part("draft_s", DRAFT_FEATURES, draft_rows, groups)
        other_rows = [_other_row(g.shape, g.nodes) for g in groups]
        self._other = _fit_part("other_s", OTHER_FEATURES, other_rows, groups)
        self._timed_as_given = _timed_as_given(runs, groups)
        fitted = [self._of(g.shape, g.nodes, g.context) for g in groups]
        measured = np.array([g.time.target_s for g in groups])
        self._bias = float(np.median(measured / np.array(expected)))
        self.points = [_point(g, f) for g, f in zip(groups, fitted, strict=True)]
        self.residuals = Residuals.of(
            np.array([g.time.wall_s for g in groups]),
            np.array([f.wall_s for f in fitted]),
            np.array([g.count for g in groups], float),
        )

    def _of(self, shape: Shape, nodes: int, context: float) -> StepTime:
        is_tree = shape.is_tree and nodes > 0
        forward = self._forward(self._batch_size, nodes + 1, context, is_tree)
        return StepTime(
            self._draft(_draft_row(shape, nodes)),
            self._target((forward, 1.0)),
            self._other(_other_row(shape, nodes)),
        )

    def __call__(self, shape: Shape, sizes: Sizes, context: float) -> StepTime:
        """The mean step of a shape whose drafts have these sizes.

        A drafter whose shapes are not searched has been timed as it is, and that time is taken.
        """
        if shape in self._timed_as_given:
            return self._timed_as_given[shape]
        return self.fitted(shape, sizes, context)

    def fitted(self, shape: Shape, sizes: Sizes, context: float) -> StepTime:
        """The mean step by the fits, whether the shape was timed or not."""
        parts = [(share, self._of(shape, nodes, context)) for nodes, share in sizes.items()]
        return StepTime(
            sum(share * step.draft_s for share, step in parts),
            sum(share * step.target_s for share, step in parts),
            sum(share * step.other_s for share, step in parts),
        )

    def to_json(self) -> dict[str, Any]:
        """Measured points, fits and what they leave over."""
        return {
            "points": self.points,
            "loop_over_isolated_forward": self._bias,
            "draft": self._draft.to_json(),
            "target": self._target.to_json(),
            "other": self._other.to_json(),
            "residuals": self.residuals.to_json(),
        }


def _timed_as_given(runs: Sequence[TimedRun], groups: Sequence[_Group]) -> dict[Shape, StepTime]:
    """Mean steps of the given configurations, whatever they drafted in each."""
    shapes = {run.candidate.shape for run in runs if run.candidate and run.candidate.is_given}
    found = {}
    for shape in shapes:
        own = [group for group in groups if group.shape == shape]
        total = sum(group.count for group in own)
        parts = ("draft_s", "target_s", "other_s")
        sums = [sum(g.count * getattr(g.time, part) for g in own) / total for part in parts]
        found[shape] = StepTime(*sums)
    return found


def _fit_part(
    part: str,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    groups: Sequence[_Group],
) -> LinearCost:
    """One part of the steps by its features; errors count against the whole step."""
    seconds = [getattr(group.time, part) for group in groups]
    walls = [group.time.wall_s for group in groups]
    return fit_linear(names, rows, seconds, walls, [group.count for group in groups])


def _is_tree(group: _Group) -> bool:
    return group.shape.is_tree and group.nodes > 0


def _groups(runs: Sequence[TimedRun], plain_s: float) -> list[_Group]:
    """Means of the steps by shape and nodes drafted, at the speed of the common plain step."""
    found: dict[tuple[Shape, int], list[tuple[float, Step]]] = {}
    for run in runs:
        assert run.candidate is not None
        for step in run.steps:
            key = (run.candidate.shape, step.nodes)
            found.setdefault(key, []).append((plain_s / run.plain_s, step))
    return [_group(*key, steps) for key, steps in found.items()]


def _group(shape: Shape, nodes: int, steps: list[tuple[float, Step]]) -> _Group:
    context = float(np.mean([step.context for _, step in steps]))
    return _Group(shape, nodes, context, mean_step(steps), len(steps))


def _point(group: _Group, fitted: StepTime) -> dict[str, Any]:
    """A measured point beside its fit, in milliseconds."""
    return {
        "shape": vars(group.shape),
        "nodes": group.nodes,
        "context": round(group.context, 1),
        "steps": group.count,
        **{
            part: {
                "measured_ms": 1000 * getattr(group.time, f"{part}_s"),
                "fitted_ms": 1000 * getattr(fitted, f"{part}_s"),
            }
            for part in ("draft", "target", "other", "wall")
        },
    }


@dataclass(frozen=True)
class TimedCost:
    """A step of a configuration that was timed as it is, over the workload.

    Attributes:
        time: seconds of the mean step.
        error: relative, one standard deviation.
    """

    time: StepTime
    error: float


def timed_costs(finals: Sequence[TimedRun], plain: StepTime) -> dict[str, TimedCost]:
    """Costs of the configurations that were timed in the same rounds, by `Candidate.key`.

    Args:
        finals: timed decodings, plain ones among them.
        plain: a step of plain decoding, which these are put in proportion to.
    """
    by_key: dict[str, list[TimedRun]] = {}
    for run in finals:
        by_key.setdefault(run.candidate.key if run.candidate else "", []).append(run)
    if len(by_key) < 2:
        return {}
    numbers = sorted({run.round for run in finals})
    table = np.array([[_log_wall(own, number) for own in by_key.values()] for number in numbers])
    effects, residuals = median_polish(table)
    ratios = np.exp(effects - effects[list(by_key).index("")])
    errors = _errors(residuals)
    found = {}
    for place, (key, own) in enumerate(by_key.items()):
        mean = mean_step([(1.0, step) for run in own for step in run.steps])
        time = mean.times(float(ratios[place]) * plain.wall_s / mean.wall_s)
        found[key] = TimedCost(time, float(errors[place]))
    del found[""]
    return found


def _log_wall(runs: Sequence[TimedRun], number: int) -> float:
    """Of the mean step of a round's runs; nan if there is none."""
    means = [
        trim_mean([s.wall_s for s in run.steps], TRIMMED) for run in runs if run.round == number
    ]
    return float(np.log(np.median(means))) if means else np.nan


def _errors(residuals: np.ndarray) -> np.ndarray:
    """Standard errors of the columns' medians, from the residuals' own medians."""
    counts = np.isfinite(residuals).sum(0)
    sigma = 1.4826 * np.nanmedian(np.abs(residuals), axis=0)
    return np.asarray(sigma * np.sqrt(np.pi / 2 / counts))


class PlainCost:
    """A step of plain decoding at one batch size.

    Args:
        runs: timed plain decodings.

    Raises:
        ValueError: not one step was timed.
    """

    def __init__(self, runs: Sequence[TimedRun]) -> None:
        walls = [run.plain_s for run in runs]
        if not walls:
            raise ValueError(
                "no step of plain decoding could be timed; give prompts and max_new_tokens that "
                "leave at least two tokens to decode"
            )
        # All moments are brought to the middle one, as the drafters' runs are.
        self.middle_s = float(np.median(walls))
        steps = [(self.middle_s / run.plain_s, step) for run in runs for step in run.steps]
        self.time = mean_step(steps)
        # Of the mean over the moments; the drift between them is divided out elsewhere.
        self.error = float(np.std(walls) / np.mean(walls) / len(walls) ** 0.5)

    def to_json(self) -> dict[str, float]:
        """Milliseconds of its parts."""
        return {
            "target_ms": 1000 * self.time.target_s,
            "other_ms": 1000 * self.time.other_s,
            "wall_ms": 1000 * self.time.wall_s,
            "relative_error": self.error,
        }


class Costs:
    """All that was measured, as one function of drafter, shape, batch and context.

    Args:
        forward: the target's forwards.
        runs: timed decodings by batch size, of the shapes that the fits are made from.
        finals: timed decodings of configurations whose own times are taken instead of the fits'.
        final_size: batch size of `finals`.
    """

    def __init__(
        self,
        forward: ForwardCost,
        runs: Mapping[int, Sequence[TimedRun]],
        finals: Sequence[TimedRun] = (),
        final_size: int = 1,
    ) -> None:
        self.forward = forward
        self.plain: dict[int, PlainCost] = {}
        self.drafters: dict[tuple[str, int], DrafterCost] = {}
        for batch_size, timed in runs.items():
            self.plain[batch_size] = PlainCost([run for run in timed if run.candidate is None])
            by_drafter: dict[str, list[TimedRun]] = {}
            for run in timed:
                if run.candidate is not None:
                    by_drafter.setdefault(run.candidate.drafter, []).append(run)
            for name, own in by_drafter.items():
                middle = self.plain[batch_size].middle_s
                self.drafters[name, batch_size] = DrafterCost(own, middle, batch_size, forward)

        costs = timed_costs(finals, self.plain[final_size].time) if finals else {}
        self._timed = {(key, final_size): cost for key, cost in costs.items()}

    def is_timed(self, candidate: Candidate, batch_size: int) -> bool:
        """Whether its own steps were timed."""
        return (candidate.key, batch_size) in self._timed

    def step(self, candidate: Candidate, batch_size: int, sizes: Sizes, context: float) -> StepTime:
        """The mean step of a candidate: its own, if it was timed."""
        if self.is_timed(candidate, batch_size):
            return self._timed[candidate.key, batch_size].time
        return self.drafters[candidate.drafter, batch_size](candidate.shape, sizes, context)

    def full_step(self, candidate: Candidate, batch_size: int, context: float) -> StepTime:
        """A step that drafts all the nodes of a candidate, by the fits wherever there are some.

        A finalist and its cuts are then timed by one ruler; and where drafts vary, what was timed
        is a mean over steps that mostly drafted fewer.
        """
        sizes = {candidate.shape.nodes: 1.0}
        drafter = self.drafters[candidate.drafter, batch_size]
        if candidate.varies or self.is_timed(candidate, batch_size):
            return drafter.fitted(candidate.shape, sizes, context)
        return drafter(candidate.shape, sizes, context)

    def uncertainty(self, candidate: Candidate, batch_size: int) -> float:
        """Relative error of a step's time against plain's, one standard deviation."""
        plain = self.plain[batch_size].error
        if self.is_timed(candidate, batch_size):
            return float(np.hypot(self._timed[candidate.key, batch_size].error, plain))
        drafter = self.drafters[candidate.drafter, batch_size]
        return float(np.hypot(drafter.residuals.rms, plain))

    def to_json(self) -> dict[str, Any]:
        """Fits and their points."""
        return {
            "forward": self.forward.to_json(),
            "plain": {str(size): cost.to_json() for size, cost in self.plain.items()},
            "drafters": [
                {"drafter": name, "batch_size": size, **cost.to_json()}
                for (name, size), cost in self.drafters.items()
            ],
        }
