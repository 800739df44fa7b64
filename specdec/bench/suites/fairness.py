"""How evenly users are served."""

from collections.abc import Sequence


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
