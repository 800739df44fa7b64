"""What a step costs on this machine, as one function of all that was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.planning.drafter_cost import DrafterCost, Sizes
from specdec.planning.forward_cost import ForwardCost
from specdec.planning.loop_times import TimedRun
from specdec.planning.shape import Candidate
from specdec.planning.step_time import StepTime, mean_step
from specdec.planning.timed_cost import timed_costs


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
