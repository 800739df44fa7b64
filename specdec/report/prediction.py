"""What a plan predicted beside what a bench measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from specdec.report.comparable import find_differences
from specdec.report.options import same_key
from specdec.report.runs import Run

# A prediction is of one target on one machine; prompts and lengths may differ.
MUST_AGREE = ("target", "sampling", "rule", "dtype", "device", "threads")


@dataclass(frozen=True)
class Match:
    """One configuration of a plan, and an arm that is the same.

    Attributes:
        plan, run: their labels.
        configuration: of the plan.
        arm: of the bench.
    """

    plan: str
    run: str
    configuration: dict[str, Any]
    arm: dict[str, Any]

    @property
    def predicted(self) -> float:
        """Speedup over plain decoding that the plan promises."""
        return float(self.configuration["predicted_speedup"])

    @property
    def measured(self) -> float:
        """Speedup over plain decoding that was measured."""
        return float(self.arm["speedup_vs_plain"])

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.measured - 1


def match(plan: Run, bench: Run) -> list[Match]:
    """Arms that are a configuration of the plan: same type, options and batch size.

    Options that were left out count as their defaults. An arm whose draft length changes while it
    runs is no configuration of a plan.
    """
    batch_size = bench.config.get("batch_size")
    arms: dict[str, dict[str, Any]] = {}
    for arm in bench.arms:
        if "type" in arm and not arm.get("draft_length") and arm["speedup_vs_plain"]:
            arms.setdefault(same_key(arm["type"], arm["options"]), arm)
    found = []
    for each in plan.data["configurations"]:
        same = arms.get(same_key(each["type"], each["options"]))
        if same is not None and each["batch_size"] == batch_size:
            found.append(Match(plan.label, bench.label, each, same))
    return found


def match_all(plans: Sequence[Run], benches: Sequence[Run]) -> tuple[list[Match], list[str]]:
    """All matches, and in words why runs were not matched."""
    found, why = [], []
    for plan in plans:
        for bench in benches:
            differ = find_differences(plan, bench, MUST_AGREE)
            if differ:
                each = differ[0]
                why.append(
                    f"{bench.label} is not matched with the plan {plan.label}: {each.key} is "
                    f"{each.values[1]!r}, not {each.values[0]!r}."
                )
            else:
                found += match(plan, bench)
    return found, why


def median_error(matches: Sequence[Match]) -> float:
    """Median of |predicted / measured - 1|."""
    return median(abs(each.error) for each in matches)


def rank_correlation(matches: Sequence[Match]) -> float | None:
    """Spearman's rho of predicted and measured speedups; None for fewer than three."""
    if len(matches) < 3:
        return None
    from scipy.stats import spearmanr

    found = spearmanr([m.predicted for m in matches], [m.measured for m in matches]).statistic
    return float(found) if found == found else None
