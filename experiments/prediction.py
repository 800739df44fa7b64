"""Planned against measured speeds, joined by configuration."""

from collections.abc import Iterable
from statistics import median

from results import read
from scipy.stats import spearmanr

from specdec.bench.results import BenchArm
from specdec.planning.results import Plan
from specdec.report.plan import Match, match_plan


def join(plan: Plan, arms: Iterable[BenchArm]) -> list[Match]:
    """Match the arms that draft with the configurations that have their very options."""
    ours = [arm for arm in arms if arm.name not in ("plain", "hf_generate")]
    sizes = {each.batch_size for each in plan.configurations}
    found = [match for size in sizes for match in match_plan(plan, ours, size)]
    exact = {each.arm.name: each for each in found if each.planned.options == each.arm.options}
    return sorted(exact.values(), key=lambda match: -match.arm.speedup_vs_plain)


def pairs(kind: str) -> list[Match]:
    """Give the matches of experiment 11, the fastest first.

    Args:
        kind: "same" prompts as the plan's, or "fresh" ones.
    """
    return join(read("11-prediction/plan.json"), read(f"11-prediction/{kind}.json").arms)


def covers(pair: Match) -> bool:
    """Tell if the predicted interval holds the measured speed."""
    planned = pair.planned
    low, high = planned.predicted_speedup_ci or 2 * [planned.predicted_speedup]
    return bool(low <= pair.arm.speedup_vs_plain <= high)


def chosen(found: list[Match]) -> Match:
    """Give the plan's fastest: its choice, where that was measured."""
    return max(found, key=lambda each: (each.planned.is_timed, each.planned.predicted_speedup))


def summary(found: list[Match]) -> dict[str, float]:
    """Give median error, rank correlation, and what is lost by the plan's choice."""
    predicted = [each.planned.predicted_speedup for each in found]
    measured = [each.arm.speedup_vs_plain for each in found]
    return {
        "configurations": len(found),
        "median_error": median(abs(each.error) for each in found),
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "covered": sum(map(covers, found)) / len(found),
        "choice_behind_best": 1 - chosen(found).arm.speedup_vs_plain / max(measured),
    }
