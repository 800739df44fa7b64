"""Percentiles of waiting times, and how evenly users are served."""

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 95, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, 95th and 99th percentile, linear between two values; empty for none."""
    if not values:
        return {}
    found = np.percentile(np.array(values), PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


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
