"""Acceptance by depth: of all steps, and of the steps that came so far."""

from collections.abc import Sequence
from typing import Any

from specdec.report.figures.style import (
    color,
    label,
    legend_below,
    line,
    marker,
    new_figure,
    to_png,
)


def acceptance_by_depth(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """Two panels, one above the other.

    Args:
        curves: (name, unconditional, conditional), each by depth; the unconditional may be empty.
    """
    panels = [(1, "accepted at this depth / all steps"), (2, "accepted / steps that tested it")]
    panels = [panel for panel in panels if any(curve[panel[0]] for curve in curves)]
    figure = new_figure(0.6 + 2.9 * len(panels) + 0.13 * len(curves))
    for axes, (which, title) in zip(_listed(figure.subplots(len(panels), 1)), panels, strict=True):
        for place, curve in enumerate(curves):
            values = curve[which]
            axes.plot(
                range(1, len(values) + 1),
                values,
                marker=marker(place),
                markersize=5,
                color=color(place),
                linestyle=line(place // 2),
                # Curves that coincide stay visible: the later ones are thinner.
                linewidth=2.6 - 1.6 * place / max(1, len(curves) - 1),
                label=label(curve[0], 34),
            )
        axes.set(ylim=(0, 1.02), xlabel="depth in the draft", ylabel="share")
        axes.set_title(title, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)


def _listed(found: Any) -> list[Any]:
    return list(found) if hasattr(found, "__len__") else [found]
