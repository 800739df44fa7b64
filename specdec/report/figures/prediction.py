"""Predicted against measured speed."""

from collections.abc import Sequence

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
from specdec.report.prediction import Match


def predicted_against_measured(matches: Sequence[Match]) -> bytes:
    """One point a configuration, with both intervals; on the diagonal the plan was right."""
    types = list(dict.fromkeys(each.configuration["type"] for each in matches))
    figure = new_figure(5.4)
    axes = figure.subplots()
    for place, kind in enumerate(types):
        for index, each in enumerate(m for m in matches if m.configuration["type"] == kind):
            axes.errorbar(
                [each.measured],
                [each.predicted],
                xerr=error_bars(each.measured, each.arm["speedup_vs_plain_ci"]),
                yerr=error_bars(each.predicted, each.configuration.get("predicted_speedup_ci")),
                marker=marker(place),
                color=color(place),
                markersize=6,
                linestyle="none",
                elinewidth=0.7,
                label="_" if index else label(kind),
            )
    low, high = _reach(matches)
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="measured speed / plain", ylabel="predicted speed / plain")
    axes.grid(alpha=0.3)
    legend_below(figure, axes, columns=3)
    return to_png(figure)


def _reach(matches: Sequence[Match]) -> tuple[float, float]:
    """Limits that hold every point with its intervals."""
    values = [value for each in matches for value in (each.measured, each.predicted)]
    for each in matches:
        values += each.arm["speedup_vs_plain_ci"] or ()
        values += each.configuration.get("predicted_speedup_ci") or ()
    margin = 0.04 * (max(values) - min(values)) + 0.01
    return min(values) - margin, max(values) + margin
