"""Speed against tau."""

from collections.abc import Sequence
from typing import Any

from specdec.report.figures.style import (
    GREY,
    color,
    error_bars,
    label,
    legend_below,
    marker,
    new_figure,
    to_png,
)


def speed_against_tau(arms: Sequence[dict[str, Any]]) -> bytes:
    """One point an arm, with both intervals, and the line where a step costs what it would plain.

    Args:
        arms: with a tau and a speedup.
    """
    figure = new_figure(4.2 + 0.13 * len(arms))
    axes = figure.subplots()
    for place, arm in enumerate(arms, start=-int(arms[0]["name"] == "plain")):
        tau, speed = arm["tau"], arm["speedup_vs_plain"]
        axes.errorbar(
            [tau],
            [speed],
            xerr=error_bars(tau, arm["tau_ci"]),
            yerr=error_bars(speed, arm["speedup_vs_plain_ci"]),
            marker=marker(place),
            color=GREY if place < 0 else color(place),
            markersize=8,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=label(arm["name"], 34),
        )
    left, right = _reach(arms, "tau")
    low, high = _reach(arms, "speedup_vs_plain")
    free = "speed = tau: all else free"
    axes.plot([1, right], [1, right], color=GREY, linestyle="--", linewidth=1, label=free)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="tau, tokens per target forward", ylabel="decode speed / plain decoding")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)


def _reach(arms: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Limits that hold 1, every value and its interval."""
    values = [1.0, *(value for arm in arms for value in (arm[key], *(arm[f"{key}_ci"] or ())))]
    margin = 0.04 * (max(values) - min(values)) + 0.02
    return min(values) - margin, max(values) + margin
