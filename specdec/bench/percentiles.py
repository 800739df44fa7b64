"""Percentiles of waiting times."""

from collections.abc import Sequence

import numpy as np


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
