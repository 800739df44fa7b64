"""Intervals of figures over prompts, by bootstrap."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

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


def tau_interval(prompts: Iterable[Any]) -> Interval:
    """Of tau over prompts, each with its own sums; those without a step are left out."""
    stats = [each for each in prompts if each.num_steps]
    accepted = np.array([each.num_accepted for each in stats])
    steps = np.array([each.num_steps for each in stats])
    return bootstrap_interval(
        (accepted, steps), lambda a, s, axis: 1 + a.sum(axis=axis) / s.sum(axis=axis)
    )


def percentiles(values: Sequence[float], wanted: Sequence[int]) -> dict[str, float]:
    """Key "p50" and so on for each percentile, linear between two values; empty for no values.

    Args:
        values: one a prompt; or one a gap between chunks, of which a prompt has many.
        wanted: percentiles, 0 to 100.
    """
    if not values:
        return {}
    found = np.percentile(np.array(values), wanted)
    return {f"p{p}": float(value) for p, value in zip(wanted, found, strict=True)}


def jain_index(speeds: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2): 1 where all users are served alike, 1 / n where one gets all.

    Source: Jain, Chiu, Hawe 1984, DEC-TR-301.
    """
    squares = sum(speed * speed for speed in speeds)
    return sum(speeds) ** 2 / (len(speeds) * squares) if squares else None


def worst_over_mean(speeds: Sequence[float]) -> float | None:
    """The slowest user's speed over the mean of all; 1 where all are served alike."""
    total = sum(speeds)
    return min(speeds) * len(speeds) / total if total else None
