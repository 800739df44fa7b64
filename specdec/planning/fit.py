"""Small models of measured times, with their residuals."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.optimize import nnls

from specdec.bench.results import Record

NotNegative = Annotated[float, Field(ge=0)]
MAX_KNOTS = 4
SWEEPS = 50


class Residuals(Record):
    """Errors of a fit, relative to the measured times."""

    median: NotNegative
    largest: NotNegative
    rms: NotNegative

    @classmethod
    def of(
        cls, measured: np.ndarray, fitted: np.ndarray, counts: np.ndarray | None = None
    ) -> "Residuals":
        """Compare times [points] with fitted ones; the mean square weighs by `counts`."""
        relative = np.abs(fitted / measured - 1)
        return cls(
            median=float(np.median(relative)),
            largest=float(relative.max()),
            rms=float(np.sqrt(np.average(relative**2, weights=counts))),
        )


class PiecewiseLinear(Record):
    """seconds = constant + per_token n + per_context c + per_token_and_context n c + the sum of
    slope_change max(0, n - knot), for n new tokens and c cached ones in a row."""

    constant: float
    per_token: float
    per_context: float
    per_token_and_context: float
    knots: list[float]
    slope_changes: list[float]
    residuals: Residuals

    def __call__(self, new_tokens: float, context: float) -> float:
        """Seconds of a forward."""
        linear = (self.constant, self.per_token, self.per_context, self.per_token_and_context)
        row = _features(np.array([new_tokens], float), np.array([context], float), self.knots)
        return float(row[0] @ np.array([*linear, *self.slope_changes]))


def _features(tokens: np.ndarray, context: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    bends = [np.maximum(0.0, tokens - knot) for knot in knots]
    return np.stack([np.ones_like(tokens), tokens, context, tokens * context, *bends], 1)


def fit_piecewise(
    new_tokens: Sequence[float], context: Sequence[float], seconds: Sequence[float]
) -> PiecewiseLinear:
    """Fit relative errors by least squares; knots join one at a time while BIC says they pay."""
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
    constant, slope, per_context, both, *changes = best[0].tolist()
    return PiecewiseLinear(
        constant=constant,
        per_token=slope,
        per_context=per_context,
        per_token_and_context=both,
        knots=knots,
        slope_changes=changes,
        residuals=Residuals.of(times, _features(tokens, cached, knots) @ best[0]),
    )


def _solve(
    tokens: np.ndarray, context: np.ndarray, seconds: np.ndarray, knots: Sequence[float]
) -> tuple[np.ndarray, float]:
    """Coefficients and BIC."""
    features = _features(tokens, context, knots) / seconds[:, None]
    coefficients = np.linalg.lstsq(features, np.ones_like(seconds), rcond=None)[0]
    errors = features @ coefficients - 1
    count = len(seconds)
    if count <= features.shape[1] and knots:
        return coefficients, np.inf
    # Errors below a tenth of a per cent are no reason for another knot.
    variance = max(float((errors**2).mean()), 1e-6)
    # A knot is two parameters: its place was chosen as well.
    num_parameters = features.shape[1] + len(knots)
    return coefficients, float(count * np.log(variance) + num_parameters * np.log(count))


class LinearCost(Record):
    """Seconds as a sum of parts, none of which makes a step cheaper."""

    coefficients: dict[str, NotNegative]
    """seconds for one of each feature"""
    residuals: Residuals

    def __call__(self, features: Sequence[float]) -> float:
        """Seconds for these features, in the order of the coefficients."""
        return float(np.dot(features, list(self.coefficients.values())))


def fit_linear(
    names: Sequence[str],
    features: Sequence[Sequence[float]],
    seconds: Sequence[float],
    scale: Sequence[float],
    counts: Sequence[float] | None = None,
) -> LinearCost:
    """Fit seconds [points] by features [points, features].

    Errors count against `scale`, the seconds of the whole step, so that a part that hardly matters
    does not decide; `counts` are the measurements that each point is the mean of.
    """
    rows, times = np.array(features, float), np.array(seconds, float)
    whole = np.array(scale, float)
    number = np.ones_like(whole) if counts is None else np.array(counts, float)
    weights = number**0.5 / whole
    # Columns of very different size would stop the solver early.
    size = np.maximum(np.abs(rows).max(0), 1e-12)
    found, _ = nnls(rows / size * weights[:, None], times * weights)
    coefficients = found / size
    return LinearCost(
        coefficients=dict(zip(names, coefficients.tolist(), strict=True)),
        residuals=Residuals.of(whole, whole + rows @ coefficients - times, number),
    )


def median_polish(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a table into effects of its rows and columns; give the columns' and the residuals.

    With medians a moment in which the machine was busy moves nothing but its own cell. A cell that
    was not measured is nan, but every row and column has a value.

    Source: Tukey 1977, Exploratory Data Analysis.
    """
    columns = np.zeros(table.shape[1])
    for _ in range(SWEEPS):
        rows = np.nanmedian(table - columns, axis=1, keepdims=True)
        columns = np.nanmedian(table - rows, axis=0)
    return columns, table - rows - columns
