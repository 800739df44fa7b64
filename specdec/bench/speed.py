"""Speeds of runs and their ratios, by prompt; definitions stand in `specdec.metrics`."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np

from specdec.bench.interval import Interval, bootstrap_interval
from specdec.bench.outcome import Run, Table

Item = TypeVar("Item")
Values = list[float | None]  # one a prompt; None where it failed or has no value


def decode_speed(run: Run) -> float:
    """Tokens/s after the first chunk, which is prefill's; nan without a later token."""
    later = len(run.tokens) - run.num_first
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def seconds_per_token(run: Run) -> float:
    """Mean time between tokens after the first chunk; nan without a later token."""
    return 1 / decode_speed(run)


def end_to_end_speed(run: Run) -> float:
    """Tokens/s, prefill included."""
    return len(run.tokens) / (run.ttft_s + run.decode_s)


def medians(table: Sequence[Sequence[Item | None]], of: Callable[[Item], float]) -> Values:
    """Each prompt's median over its repeats; failed ones and those without a value are left out."""
    return [_median(of(run) for run in row if run is not None) for row in table]


def paired_ratios(table: Table, baseline: Table, of: Callable[[Run], float]) -> Values:
    """Each prompt's median of the ratios of speeds, paired within each repeat."""
    return [
        _median(
            of(a) / of(b)
            for a, b in zip(ours, theirs, strict=True)
            if a is not None and b is not None
        )
        for ours, theirs in zip(table, baseline, strict=True)
    ]


def mean_with_interval(key: str, values: Values) -> dict[str, Any]:
    """The mean over the prompts that have a value, and `KEY_ci`."""
    known = present(values)
    mean = float(np.mean(known)) if known else None
    return {key: mean, f"{key}_ci": _interval(known)}


def present(values: Values) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return median(finite) if finite else None


def _interval(values: list[float]) -> Interval:
    return bootstrap_interval((np.array(values),), lambda x, axis: x.mean(axis=axis))
