"""Intervals of figures over prompts, by bootstrap."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from specdec.metrics import AcceptanceStats

Interval = tuple[float, float] | None


def bootstrap_interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> Interval:
    """95 % percentile interval over prompts; None for fewer than two.

    Args:
        samples: arrays [prompts] that are drawn together.
        statistic: of such arrays along `axis`.
    """
    if len(samples[0]) < 2:
        return None
    found = bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def tau_interval(prompts: Iterable[AcceptanceStats]) -> Interval:
    """Of tau over prompts, each with its own sums; those without a step are left out."""
    stats = [each for each in prompts if each.num_steps]
    accepted = np.array([each.num_accepted for each in stats])
    steps = np.array([each.num_steps for each in stats])
    return bootstrap_interval(
        (accepted, steps), lambda a, s, axis: 1 + a.sum(axis=axis) / s.sum(axis=axis)
    )
