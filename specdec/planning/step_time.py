"""Seconds of a step, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

# Share of the slowest and of the fastest steps that a mean leaves out: other programs' noise.
TRIMMED = 0.1


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Attributes:
        draft_s: in the drafter's forwards.
        target_s: in the target's forward.
        other_s: everything else.
    """

    draft_s: float
    target_s: float
    other_s: float

    @property
    def wall_s(self) -> float:
        """Seconds of the whole step."""
        return self.draft_s + self.target_s + self.other_s

    def times(self, factor: float) -> "StepTime":
        """All parts, longer or shorter."""
        return StepTime(factor * self.draft_s, factor * self.target_s, factor * self.other_s)


def mean_step(steps: Sequence[tuple[float, StepTime]]) -> StepTime:
    """The trimmed mean of steps, each at its scale."""
    scale = np.array([scale for scale, _ in steps])
    parts = ("draft_s", "target_s", "other_s")
    times = [np.array([getattr(step, part) for _, step in steps]) * scale for part in parts]
    return StepTime(*(float(trim_mean(each, TRIMMED)) for each in times))
