"""Figures over prompts: ratios of total times, percentiles, fairness, and bootstrap intervals."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

Interval = tuple[float, float] | None


class Work(NamedTuple):
    """Tokens of a prompt and the seconds that they took."""

    tokens: float
    seconds: float


Works = Sequence[Work | None]  # one a prompt; None where it failed or emitted nothing that counts


def bootstrap_interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> Interval:
    """95 % percentile interval of a statistic along `axis`, arrays [prompts] drawn together."""
    if len(samples[0]) < 2:
        return None
    options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile"}
    rng = np.random.default_rng(0)
    found = bootstrap(samples, statistic, n_resamples=2000, rng=rng, **options).confidence_interval
    return float(found.low), float(found.high)


def total_speed(key: str, over: Sequence[Works], under: Sequence[Works] = ()) -> dict[str, Any]:
    """Total tokens over total seconds of each arm; those of `over` multiplied, of `under` divided.

    It and its bootstrap interval `KEY_ci` are over the prompts that all arms have.
    """
    both = [row for row in zip(*over, *under, strict=True) if None not in row]
    if not both:
        return {key: None, f"{key}_ci": None}

    def speed(*parts: np.ndarray, axis: int) -> Any:
        sums = [part.sum(axis=axis) for part in parts]
        speeds = [tokens / seconds for tokens, seconds in zip(sums[::2], sums[1::2], strict=True)]
        return np.prod(speeds[: len(over)], axis=0) / np.prod(speeds[len(over) :], axis=0)

    parts = tuple(np.array(both).reshape(len(both), -1).T)
    return {key: float(speed(*parts, axis=0)), f"{key}_ci": bootstrap_interval(parts, speed)}


def tau_interval(prompts: Iterable[Any]) -> Interval:
    """Interval of tau over prompts' `AcceptanceStats`; those without a step are left out."""
    stats = [each for each in prompts if each.num_steps]
    accepted = np.array([each.num_accepted for each in stats])
    steps = np.array([each.num_steps for each in stats])
    return bootstrap_interval(
        (accepted, steps), lambda a, s, axis: 1 + a.sum(axis=axis) / s.sum(axis=axis)
    )


def percentiles(values: Sequence[float], wanted: Sequence[int]) -> dict[str, float]:
    """Key "p50" and so on for each percentile, linear between two values; empty for no values."""
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
