"""Expected tau of drafts that were not run."""

from collections.abc import Sequence
from typing import Any

from specdec.report.figures.style import color, label, legend_below, marker, new_figure, to_png


def expected_tau(drafters: Sequence[dict[str, Any]]) -> bytes:
    """Tau against drafted tokens a step: a line of chains and one of trees a drafter.

    Args:
        drafters: of an analysis, with `expected`.
    """
    figure = new_figure(4.0 + 0.13 * len(drafters))
    axes = figure.subplots()
    for place, drafter in enumerate(drafters):
        for key, style, fill in (("chains", "-", None), ("trees", "--", "white")):
            drafts = sorted(drafter["expected"][key], key=lambda each: each["nodes_per_step"])
            axes.plot(
                [each["nodes_per_step"] for each in drafts],
                [each["tau"] for each in drafts],
                marker=marker(place),
                markersize=5,
                markerfacecolor=fill,
                color=color(place),
                linestyle=style,
                label=label(f"{drafter['name']}, {key}", 34) if drafts else "_",
            )
    axes.set(xlabel="drafted tokens a step", ylabel="expected tau")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
