"""Speeds of runs and their ratios, by prompt; definitions stand in `specdec.metrics`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np

from specdec.bench.interval import bootstrap_interval
from specdec.bench.outcome import Run, Table

Item = TypeVar("Item")
Values = list[float | None]  # one a prompt; None where it failed or has no value

# Fewer prompts than this all lie on one side of the truth by chance in more than 5 % of runs.
MIN_PROMPTS = 5
# Share of a speedup that is put down to the machine.
NOISE = 0.1


class Work(NamedTuple):
    """Tokens of a prompt and the seconds that they took."""

    tokens: float
    seconds: float


Works = Sequence[Work | None]  # one a prompt; None where it failed or emitted nothing that counts


def decode_tokens(run: Run) -> int:
    """Tokens after the first chunk, which is prefill's."""
    return len(run.tokens) - run.num_first


def decode_speed(run: Run) -> float:
    """Tokens/s after the first chunk; nan without a later token."""
    later = decode_tokens(run)
    return later / run.decode_s if later > 0 and run.decode_s > 0 else float("nan")


def seconds_per_token(run: Run) -> float:
    """Mean time between tokens after the first chunk; nan without a later token."""
    return 1 / decode_speed(run)


def end_to_end_speed(run: Run) -> float:
    """Tokens/s, prefill included."""
    return len(run.tokens) / (run.ttft_s + run.decode_s)


def decode_work(table: Table) -> list[Work | None]:
    """Tokens after the first chunk of each prompt, and their seconds."""
    return _work(table, decode_tokens, decode_speed)


def end_to_end_work(table: Table) -> list[Work | None]:
    """All tokens of each prompt, and their seconds with prefill."""
    return _work(table, lambda run: len(run.tokens), end_to_end_speed)


def _work(table: Table, tokens: Callable[[Run], int], of: Callable[[Run], float]) -> list:
    """A prompt's mean tokens at its median speed: one slow repeat moves nothing."""
    found: list[Work | None] = []
    for row, speed in zip(table, medians(table, of), strict=True):
        counts = [tokens(run) for run in row if run is not None]
        mean = sum(counts) / len(counts) if counts else 0
        found.append(Work(mean, mean / speed) if speed else None)
    return found


def total_speed(key: str, over: Sequence[Works], under: Sequence[Works] = ()) -> dict[str, Any]:
    """Total tokens over total seconds of each arm; those of `over` multiplied, of `under` divided.

    Args:
        key: name of the figure; its interval is `KEY_ci`.
        over: arms, each with one entry a prompt.
        under: likewise.

    Returns:
        The figure over the prompts that all arms have, and its interval by bootstrap over them, the
        arms drawn together.
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


def mean_ratio(table: Table, plain: Table) -> float | None:
    """Mean over prompts of the ratios of decode speeds: short, easy answers dominate it."""
    known = present(paired_ratios(table, plain, decode_speed))
    return float(np.mean(known)) if known else None


def medians(table: Sequence[Sequence[Item | None]], of: Callable[[Item], float]) -> Values:
    """Each prompt's median over its repeats; failed ones and those without a value are left out."""
    return [_median(of(run) for run in row if run is not None) for row in table]


def faster_than_tau(results: Mapping[str, Any]) -> list[str]:
    """Complaints about arms that were faster than their tau, which no drafter can be.

    A step costs at least what a step of plain decoding costs, so the speedup of rows that are
    decoded one at a time is at most tau. (In a batch rows that end early leave the others a
    cheaper one.) Intervals over prompts and a tenth of the speedup are put down to noise.

    Args:
        results: of a bench or a suite.
    """
    config = (results.get("provenance") or {}).get("config") or {}
    if results.get("suite") == "concurrent" or config.get("batch_size", 1) > 1:
        return []
    return [
        f"the arm {arm['name']!r}{part.get('name', '') and ' in ' + part['name']} is "
        f"{arm['speedup_vs_plain']:.2f} times as fast as plain decoding (at least {low:.2f}) but "
        f"accepts only {arm['tau']:.2f} tokens a step (at most {arm['tau_ci'][1]:.2f}), which no "
        "speed can pass: the machine was busy while plain decoding ran; measure again in a new "
        "folder with nothing else running"
        for part in results.get("groups", [results])
        for arm in part["arms"]
        if arm["tau_ci"]
        and arm["speedup_vs_plain_ci"]
        and arm.get("prompts", arm.get("requests")) >= MIN_PROMPTS
        and (low := arm["speedup_vs_plain_ci"][0]) > (1 + NOISE) * arm["tau_ci"][1]
    ]


def present(values: Values) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return median(finite) if finite else None
