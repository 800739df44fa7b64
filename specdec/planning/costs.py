"""The cost of a step on this machine, as one function of all that was measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from specdec.drafters.base import DraftShape
from specdec.planning.candidates import Candidate
from specdec.planning.fit import Residuals, fit_linear, fit_piecewise, median_polish
from specdec.planning.results import (
    DrafterFit,
    ForwardFit,
    ForwardPoint,
    MeasuredCosts,
    PartTime,
    PlainStep,
    StepPoint,
)
from specdec.planning.times import PARTS, TRIMMED, Step, StepTime, TimedRun, mean_step

FEATURES = {
    "draft_s": ("step", "level", "fed_node", "drafted", "node", "root_of_nodes"),
    "target_s": ("forward", "step"),
    "other_s": ("step", "drafted", "level", "candidate", "node", "tree"),
}

# Drafted nodes of a step and how often: {nodes: share}.
Sizes = Mapping[int, float]


def forward_points(cells: Iterable[Mapping[str, Any]]) -> list[ForwardPoint]:
    """Medians over the repeats of timed cells {"batch", "context", "chain", "tree"}."""
    found: dict[tuple[int, int, int, bool], list[float]] = {}
    for cell in cells:
        for kind in ("chain", "tree"):
            for count, seconds in cell.get(kind, {}).items():
                key = (cell["batch"], int(count), cell["context"], kind == "tree")
                found.setdefault(key, []).append(seconds)
    points = []
    for (batch_size, new_tokens, context, is_tree), times in sorted(found.items()):
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        points.append(
            ForwardPoint(
                batch_size=batch_size,
                new_tokens=new_tokens,
                context=context,
                is_tree=is_tree,
                median_s=middle,
                spread_s=high - low,
                repeats=len(times),
            )
        )
    return points


class ForwardCost:
    """Seconds of a target forward, between the measured batches by linear interpolation.

    Attributes:
        points: measurements that it was fitted to.
        fits: by batch size, in order.
    """

    def __init__(self, points: Sequence[ForwardPoint]) -> None:
        if not points:
            raise ValueError(
                "no target forward was timed, nothing fitted into memory; use a smaller target, "
                "dtype or batch"
            )
        self.points = list(points)
        self.fits: dict[int, ForwardFit] = {}
        for batch in sorted({p.batch_size for p in points}):
            chains = [p for p in points if p.batch_size == batch and not p.is_tree]
            trees = [p for p in points if p.batch_size == batch and p.is_tree]
            chain = fit_piecewise(
                [p.new_tokens for p in chains],
                [p.context for p in chains],
                [p.median_s for p in chains],
            )
            tree = None
            if trees:
                rows = [(1.0, p.new_tokens) for p in trees]
                extra = [p.median_s - chain(p.new_tokens, p.context) for p in trees]
                tree = fit_linear(("tree", "token"), rows, extra, [p.median_s for p in trees])
            self.fits[batch] = ForwardFit(chain=chain, tree_extra=tree)

    def __call__(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        """Seconds of a forward over `new_tokens` in each of `batch_size` rows."""
        sizes, times = list(self.fits), []
        for fit in self.fits.values():
            seconds = fit.chain(new_tokens, context)
            if is_tree and fit.tree_extra:
                seconds += fit.tree_extra((1.0, new_tokens))
            times.append(max(seconds, 1e-9))
        if batch_size > sizes[-1]:
            return times[-1] * batch_size / sizes[-1]
        return float(np.interp(batch_size, sizes, times))


@dataclass(frozen=True)
class _Group:
    """Steps of one shape that drafted as many nodes."""

    shape: DraftShape
    nodes: int
    context: float
    time: StepTime
    count: int


class DrafterCost:
    """A step with one drafter at one batch size, for any of its shapes.

    The runs' times are brought to a common plain step of `plain_s` seconds: each run is compared
    with the plain ones of its own moment.

    Attributes:
        fit: fits, with the points that they were made from.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        runs: Sequence[TimedRun],
        plain_s: float,
        forward: ForwardCost,
    ) -> None:
        self._forward, self._batch_size = forward, batch_size
        groups = _groups(runs, plain_s)
        walls, counts = [g.time.wall_s for g in groups], [g.count for g in groups]
        features = [self._features(g.shape, g.nodes, g.context) for g in groups]
        self._parts = {
            part: fit_linear(
                names,
                [row[part] for row in features],
                [getattr(g.time, part) for g in groups],
                walls,
                counts,
            )
            for part, names in FEATURES.items()
        }
        fitted = [self._step(g.shape, g.nodes, g.context) for g in groups]
        isolated = [row["target_s"][0] for row in features]
        ratios = [g.time.target_s / s for g, s in zip(groups, isolated, strict=True)]
        self._given = _timed_as_given(runs, groups)
        self.fit = DrafterFit(
            drafter=name,
            batch_size=batch_size,
            points=[_point(g, step) for g, step in zip(groups, fitted, strict=True)],
            loop_over_isolated_forward=float(np.median(ratios)),
            draft=self._parts["draft_s"],
            target=self._parts["target_s"],
            other=self._parts["other_s"],
            residuals=Residuals.of(
                np.array(walls), np.array([step.wall_s for step in fitted]), np.array(counts, float)
            ),
        )

    def _features(
        self, shape: DraftShape, nodes: int, context: float
    ) -> dict[str, tuple[float, ...]]:
        """The features of each part of a step, in the order of `FEATURES`."""
        # A chain that a threshold ends has looked one token further.
        levels = min(nodes + 1 if shape.threshold else nodes, shape.depth)
        drafted, is_tree = float(nodes > 0), shape.is_tree and nodes > 0
        forward = self._forward(self._batch_size, nodes + 1, context, is_tree)
        draft: tuple[float, ...]
        if shape.depth:
            more = max(levels - 1, 0)
            draft = (float(levels > 0), more, more * shape.width, 0.0, 0.0, 0.0)
        else:
            draft = (1.0, 0.0, 0.0, drafted, nodes, nodes**0.5)
        candidates = levels * shape.width * is_tree
        other = (1.0, drafted, levels, candidates, nodes, float(is_tree))
        return {"draft_s": draft, "target_s": (forward, 1.0), "other_s": other}

    def _step(self, shape: DraftShape, nodes: int, context: float) -> StepTime:
        features = self._features(shape, nodes, context)
        return StepTime(*(self._parts[part](features[part]) for part in PARTS))

    def __call__(self, shape: DraftShape, sizes: Sizes, context: float) -> StepTime:
        """The mean step of a shape whose drafts have these sizes.

        A drafter whose shapes are not searched has been timed as it is, and that time is taken.
        """
        return self._given.get(shape) or self.fitted(shape, sizes, context)

    def fitted(self, shape: DraftShape, sizes: Sizes, context: float) -> StepTime:
        """The mean step by the fits, even where the shape was timed."""
        return StepTime.weighted(
            [(share, self._step(shape, nodes, context)) for nodes, share in sizes.items()]
        )


def _groups(runs: Sequence[TimedRun], plain_s: float) -> list[_Group]:
    """Means of the steps by shape and nodes drafted, at the speed of the common plain step."""
    found: dict[tuple[DraftShape, int], list[tuple[float, Step]]] = {}
    for run in runs:
        assert run.candidate is not None
        for step in run.steps:
            key = (run.candidate.shape, step.nodes)
            found.setdefault(key, []).append((plain_s / run.plain_s, step))
    return [
        _Group(*key, float(np.mean([s.context for _, s in steps])), mean_step(steps), len(steps))
        for key, steps in found.items()
    ]


def _timed_as_given(
    runs: Sequence[TimedRun], groups: Sequence[_Group]
) -> dict[DraftShape, StepTime]:
    """Mean steps of the given configurations, whatever they drafted in each."""
    found = {}
    for shape in {run.candidate.shape for run in runs if run.candidate and run.candidate.is_given}:
        own = [group for group in groups if group.shape == shape]
        total = sum(group.count for group in own)
        found[shape] = StepTime.weighted([(group.count / total, group.time) for group in own])
    return found


def _point(group: _Group, fitted: StepTime) -> StepPoint:
    times = zip(group.time.ms().items(), fitted.ms().values(), strict=True)
    return StepPoint(
        shape=group.shape,
        nodes=group.nodes,
        context=round(group.context, 1),
        steps=group.count,
        **{part: PartTime(measured_ms=ours, fitted_ms=theirs) for (part, ours), theirs in times},
    )


def _timed_costs(finals: Sequence[TimedRun], plain: StepTime) -> dict[str, tuple[StepTime, float]]:
    """Mean steps of the configurations that were timed in the same rounds, by `Candidate.key`.

    With each comes its relative error, one standard deviation. Plain decodings are among the
    `finals`, and are put in proportion to the `plain` step.
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
    # Standard errors of the columns' medians, from the residuals' own medians.
    sigma = 1.4826 * np.nanmedian(np.abs(residuals), axis=0)
    errors = sigma * np.sqrt(np.pi / 2 / np.isfinite(residuals).sum(0))
    found = {}
    for place, (key, own) in enumerate(by_key.items()):
        mean = mean_step([(1.0, step) for run in own for step in run.steps])
        scale = float(ratios[place]) * plain.wall_s / mean.wall_s
        found[key] = StepTime.weighted([(scale, mean)]), float(errors[place])
    del found[""]
    return found


def _log_wall(runs: Sequence[TimedRun], number: int) -> float:
    """Logarithm of the mean step of a round's runs; nan if there is none."""
    means = [
        trim_mean([s.wall_s for s in run.steps], TRIMMED) for run in runs if run.round == number
    ]
    return float(np.log(np.median(means))) if means else np.nan


class PlainCost:
    """A step of plain decoding at one batch size.

    Attributes:
        middle_s: median seconds; all moments are brought to it, as the drafters' runs are.
        time: the mean step.
        error: relative error of the mean over the moments; the drift between them is divided out
            elsewhere.
    """

    def __init__(self, runs: Sequence[TimedRun]) -> None:
        walls = [run.plain_s for run in runs]
        if not walls:
            raise ValueError(
                "no step of plain decoding could be timed; give prompts and max_new_tokens that "
                "leave at least two tokens to decode"
            )
        self.middle_s = float(np.median(walls))
        steps = [(self.middle_s / run.plain_s, step) for run in runs for step in run.steps]
        self.time = mean_step(steps)
        self.error = float(np.std(walls) / np.mean(walls) / len(walls) ** 0.5)

    def described(self) -> PlainStep:
        """The step as a plan holds it."""
        times = {f"{part}_ms": ms for part, ms in self.time.ms().items() if part != "draft"}
        return PlainStep(**times, relative_error=self.error)


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
        for size, timed in runs.items():
            self.plain[size] = PlainCost([run for run in timed if run.candidate is None])
            by_drafter: dict[str, list[TimedRun]] = {}
            for run in timed:
                if run.candidate is not None:
                    by_drafter.setdefault(run.candidate.drafter, []).append(run)
            for name, own in by_drafter.items():
                plain_s = self.plain[size].middle_s
                self.drafters[name, size] = DrafterCost(name, size, own, plain_s, forward)
        costs = _timed_costs(finals, self.plain[final_size].time) if finals else {}
        self._timed = {(key, final_size): cost for key, cost in costs.items()}

    def is_timed(self, candidate: Candidate, batch_size: int) -> bool:
        """Tell if its own steps were timed."""
        return (candidate.key, batch_size) in self._timed

    def step(self, candidate: Candidate, batch_size: int, sizes: Sizes, context: float) -> StepTime:
        """The mean step of a candidate: its own, if it was timed."""
        if self.is_timed(candidate, batch_size):
            return self._timed[candidate.key, batch_size][0]
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
        if self.is_timed(candidate, batch_size):
            own = self._timed[candidate.key, batch_size][1]
        else:
            own = self.drafters[candidate.drafter, batch_size].fit.residuals.rms
        return float(np.hypot(own, self.plain[batch_size].error))

    def described(self, skipped: Sequence[str]) -> MeasuredCosts:
        """The costs as a plan holds them."""
        return MeasuredCosts(
            points=self.forward.points,
            skipped=list(skipped),
            forward=self.forward.fits,
            plain={size: cost.described() for size, cost in self.plain.items()},
            drafters=[cost.fit for cost in self.drafters.values()],
        )
