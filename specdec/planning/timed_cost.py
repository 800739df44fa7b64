"""What steps cost that were timed as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

from specdec.planning.loop_times import TimedRun
from specdec.planning.polish import median_polish
from specdec.planning.step_time import TRIMMED, StepTime, mean_step


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
