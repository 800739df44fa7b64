"""Small models of measured times: piecewise linear and plain linear, with what they leave over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

MAX_KNOTS = 4


@dataclass(frozen=True)
class Residuals:
    """What a fit leaves over, relative to the measured times."""

    median: float
    largest: float
    rms: float

    @classmethod
    def of(
        cls, measured: np.ndarray, fitted: np.ndarray, counts: np.ndarray | None = None
    ) -> "Residuals":
        """Of times [points] against fitted ones [points]; the mean square weighs by `counts`."""
        relative = np.abs(fitted / measured - 1)
        return cls(
            float(np.median(relative)),
            float(relative.max()),
            float(np.sqrt(np.average(relative**2, weights=counts))),
        )

    def to_json(self) -> dict[str, float]:
        """Fields as JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class PiecewiseLinear:
    """Seconds of a forward: linear in the new tokens between knots, and in the context.

    t(n, c) = constant + slope n + sum over knots of change max(0, n - knot) + (context +
    context_by_tokens n) c.

    Attributes:
        knots: where the slope changes.
        coefficients: constant, slope, context, context_by_tokens, then the changes.
        residuals: relative to the points it was fitted to.
    """

    knots: tuple[float, ...]
    coefficients: tuple[float, ...]
    residuals: Residuals

    def __call__(self, new_tokens: float, context: float) -> float:
        """Seconds."""
        row = _features(np.array([new_tokens], float), np.array([context], float), self.knots)
        return float(row[0] @ np.array(self.coefficients))

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON, coefficients in seconds."""
        names = ("constant", "per_token", "per_context", "per_token_and_context")
        return {
            **dict(zip(names, self.coefficients, strict=False)),
            "knots": list(self.knots),
            "slope_changes": list(self.coefficients[len(names) :]),
            "residuals": self.residuals.to_json(),
        }


def _features(tokens: np.ndarray, context: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    bends = [np.maximum(0.0, tokens - knot) for knot in knots]
    return np.stack([np.ones_like(tokens), tokens, context, tokens * context, *bends], 1)


def fit_piecewise(
    new_tokens: Sequence[float], context: Sequence[float], seconds: Sequence[float]
) -> PiecewiseLinear:
    """Fit relative errors by least squares; knots join one at a time while BIC says they pay.

    Args:
        new_tokens: [points] tokens of the forward, per row.
        context: [points] tokens cached before, per row.
        seconds: [points] above zero.

    Raises:
        ValueError: no point, or lengths that differ.
    """
    tokens, cached, times = (np.array(x, float) for x in (new_tokens, context, seconds))
    if not len(times) or not len(tokens) == len(cached) == len(times):
        raise ValueError(
            f"there are {len(times)} times for {len(tokens)} numbers of tokens and {len(cached)} "
            "contexts; give one of each for at least one point"
        )
    # Between the first and the last number of tokens that was measured.
    free = sorted(set(tokens.tolist()))[1:-1]
    knots: list[float] = []
    best = _solve(tokens, cached, times, knots)
    while free and len(knots) < MAX_KNOTS:
        tried = [(_solve(tokens, cached, times, sorted([*knots, k])), k) for k in free]
        (found, knot) = min(tried, key=lambda pair: pair[0][1])
        if found[1] >= best[1]:
            break
        knots, best = sorted([*knots, knot]), found
        free.remove(knot)
    coefficients, _ = best
    fitted = _features(tokens, cached, knots) @ coefficients
    return PiecewiseLinear(
        tuple(knots), tuple(float(c) for c in coefficients), Residuals.of(times, fitted)
    )


def _solve(
    tokens: np.ndarray, context: np.ndarray, seconds: np.ndarray, knots: Sequence[float]
) -> tuple[np.ndarray, float]:
    """Coefficients and BIC."""
    features = _features(tokens, context, knots) / seconds[:, None]
    coefficients = np.linalg.lstsq(features, np.ones_like(seconds), rcond=None)[0]
    errors = features @ coefficients - 1
    count = len(seconds)
    spare = count - features.shape[1]
    if spare <= 0 and knots:
        return coefficients, np.inf
    # Errors below a tenth of a per cent are no reason for another knot.
    variance = max(float((errors**2).mean()), 1e-6)
    # A knot is two parameters: its place was chosen as well.
    num_parameters = features.shape[1] + len(knots)
    return coefficients, float(count * np.log(variance) + num_parameters * np.log(count))


@dataclass(frozen=True)
class LinearCost:
    """Seconds as a sum of non-negative parts.

    Attributes:
        names: of the features.
        coefficients: seconds for one of each.
        residuals: relative to what it was fitted to.
    """

    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    residuals: Residuals

    def __call__(self, features: Sequence[float]) -> float:
        """Seconds for these features."""
        return float(np.dot(features, self.coefficients))

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON."""
        return {
            "coefficients": dict(zip(self.names, self.coefficients, strict=True)),
            "residuals": self.residuals.to_json(),
        }


def fit_linear(
    names: Sequence[str],
    features: Sequence[Sequence[float]],
    seconds: Sequence[float],
    scale: Sequence[float],
    counts: Sequence[float] | None = None,
) -> LinearCost:
    """Fit seconds by features, none of which may make a step cheaper.

    Args:
        names: of the features.
        features: [points, features].
        seconds: [points].
        scale: [points] what an error is measured against, above zero: the seconds of the whole
            step, so that a part that hardly matters does not decide.
        counts: [points] how many measurements each is the mean of; None for as many.
    """
    rows, times = np.array(features, float), np.array(seconds, float)
    whole = np.array(scale, float)
    number = np.ones_like(whole) if counts is None else np.array(counts, float)
    weights = number**0.5 / whole
    # Columns of very different size would stop the solver early.
    size = np.maximum(np.abs(rows).max(0), 1e-12)
    found, _ = nnls(rows / size * weights[:, None], times * weights)
    coefficients = found / size
    fitted = rows @ coefficients
    return LinearCost(
        tuple(names),
        tuple(float(c) for c in coefficients),
        Residuals.of(whole, whole + fitted - times, number),
    )


SWEEPS = 50


def median_polish(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a table into effects of its rows and of its columns, added, and what they leave over.

    Medians, so that a moment in which the machine was busy moves nothing but its own cell.

    Args:
        table: [rows, columns]; nan where nothing was measured, but no row and no column without
            a value.

    Returns:
        Effects of the columns, up to a constant, and residuals [rows, columns].

    Source: Tukey 1977, Exploratory Data Analysis.
    """
    columns = np.zeros(table.shape[1])
    for _ in range(SWEEPS):
        rows = np.nanmedian(table - columns, axis=1, keepdims=True)
        columns = np.nanmedian(table - rows, axis=0)
    return columns, table - rows - columns
