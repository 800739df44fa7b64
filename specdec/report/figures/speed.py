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
    reach = 1.08 * max(arm["tau"] for arm in arms)
    top = 1.1 * max(arm["speedup_vs_plain"] for arm in arms)
    end = min(reach, max(top, 1.2))
    free = "speed = tau: all else free"
    axes.plot([1, reach], [1, reach], color=GREY, linestyle="--", linewidth=1, label=free)
    axes.axhline(1, color=GREY, linewidth=0.8)
    low = min(arm["speedup_vs_plain"] for arm in arms)
    axes.set(xlim=(min(0.95, 1 - 0.02 * reach), reach), ylim=(min(0.9, 0.9 * low), end * 1.02))
    axes.set(xlabel="tau, tokens per target forward", ylabel="decode speed / plain decoding")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
