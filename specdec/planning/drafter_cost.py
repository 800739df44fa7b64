"""What a step with a drafter costs on this machine: fits to timed decodings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.planning.fit import LinearCost, Residuals, fit_linear
from specdec.planning.forward_cost import ForwardCost
from specdec.planning.loop_times import Step, TimedRun
from specdec.planning.shape import Shape
from specdec.planning.step_time import StepTime, mean_step

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
