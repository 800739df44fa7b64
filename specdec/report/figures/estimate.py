"""Estimated speed by draft length."""

from collections.abc import Sequence
from typing import Any

from specdec.report.figures.style import (
    GREY,
    color,
    label,
    legend_below,
    line,
    marker,
    new_figure,
    to_png,
)


def estimated_speed(drafters: Sequence[dict[str, Any]]) -> bytes:
    """A line a draft model, marked as an estimate in the picture itself.

    Args:
        drafters: of an estimate, at one batch size.
    """
    figure = new_figure(3.8 + 0.13 * len(drafters))
    axes = figure.subplots()
    for place, drafter in enumerate(drafters):
        axes.plot(
            [each["num_draft_tokens"] for each in drafter["lengths"]],
            [each["estimated_speedup"] for each in drafter["lengths"]],
            marker=marker(place),
            markersize=5,
            color=color(place),
            linestyle=line(place),
            label=label(drafter["name"], 34),
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="drafted tokens a step", ylabel="speed / plain decoding, ESTIMATED")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
