"""Planned against measured speeds, joined by configuration."""

from statistics import median
from typing import Any

from results import arms_of, read, speed
from scipy.stats import spearmanr

Pair = tuple[dict[str, Any], dict[str, Any]]  # what was planned, and what was measured


def pairs(kind: str) -> list[Pair]:
    """Every measured configuration with its prediction, the fastest first.

    Args:
        kind: "same" prompts as the plan's, or "fresh" ones.
    """
    planned = {each["name"]: each for each in read("11-prediction/plan.json")["configurations"]}
    arms = arms_of(read(f"11-prediction/{kind}.json"))
    found = [(planned[name], arm) for name, arm in arms.items() if name in planned]
    return sorted(found, key=lambda pair: -speed(pair[1]))


def error(pair: Pair) -> float:
    """Of the predicted speed, relative to the measured one."""
    planned, arm = pair
    return planned["predicted_speedup"] / speed(arm) - 1


def covers(pair: Pair) -> bool:
    """Whether the predicted interval holds the measured speed."""
    low, high = pair[0]["predicted_speedup_ci"] or 2 * [pair[0]["predicted_speedup"]]
    return bool(low <= speed(pair[1]) <= high)


def summary(found: list[Pair]) -> dict[str, float]:
    """Median error, rank correlation, and what is lost by the plan's choice."""
    by_plan = max(found, key=lambda pair: pair[0]["predicted_speedup"])
    ranks = spearmanr([p["predicted_speedup"] for p, _ in found], [speed(arm) for _, arm in found])
    return {
        "configurations": len(found),
        "median_error": median(abs(error(pair)) for pair in found),
        "rank_correlation": float(ranks.statistic),
        "covered": sum(map(covers, found)) / len(found),
        "choice_behind_best": 1 - speed(by_plan[1]) / max(speed(arm) for _, arm in found),
    }
