"""Planned against measured speeds, joined by configuration."""

import json
from collections.abc import Iterable
from statistics import median
from typing import Any

from results import arms_of, read, speed
from scipy.stats import spearmanr

Row = dict[str, Any]
Pair = tuple[Row, Row]  # what was planned, and what was measured


def key_of(row: Row) -> str:
    """What a planned configuration and the arm that is the same share: type and options."""
    return json.dumps([row["type"], row["options"]], sort_keys=True)


def join(planned: Iterable[Row], arms: Iterable[Row]) -> list[Pair]:
    """Every measured arm that was planned with its prediction, the fastest first."""
    by_key = {key_of(row): row for row in planned}
    found = [(by_key[key_of(arm)], arm) for arm in arms if key_of(arm) in by_key]
    return sorted(found, key=lambda pair: -speed(pair[1]))


def drafting(arms: Iterable[Row]) -> list[Row]:
    """The arms that draft and have a speed: not the two that decode plainly."""
    ours = (arm for arm in arms if arm["name"] not in ("plain", "hf_generate"))
    return [arm for arm in ours if arm["speedup_vs_plain"]]


def pairs(kind: str) -> list[Pair]:
    """The pairs of experiment 11.

    Args:
        kind: "same" prompts as the plan's, or "fresh" ones.
    """
    planned = read("11-prediction/plan.json")["configurations"]
    return join(planned, drafting(arms_of(read(f"11-prediction/{kind}.json")).values()))


def error(pair: Pair) -> float:
    """Of the predicted speed, relative to the measured one."""
    planned, arm = pair
    return planned["predicted_speedup"] / speed(arm) - 1


def covers(pair: Pair) -> bool:
    """Whether the predicted interval holds the measured speed."""
    low, high = pair[0]["predicted_speedup_ci"] or 2 * [pair[0]["predicted_speedup"]]
    return bool(low <= speed(pair[1]) <= high)


def chosen(found: list[Pair]) -> Pair:
    """What the plan holds for the fastest: its choice, where that was measured."""
    return max(found, key=lambda pair: (pair[0]["is_timed"], pair[0]["predicted_speedup"]))


def summary(found: list[Pair]) -> dict[str, float]:
    """Median error, rank correlation, and what is lost by the plan's choice."""
    ranks = spearmanr([p["predicted_speedup"] for p, _ in found], [speed(arm) for _, arm in found])
    return {
        "configurations": len(found),
        "median_error": median(abs(error(pair)) for pair in found),
        "rank_correlation": float(ranks.statistic),
        "covered": sum(map(covers, found)) / len(found),
        "choice_behind_best": 1 - speed(chosen(found)[1]) / max(speed(arm) for _, arm in found),
    }
