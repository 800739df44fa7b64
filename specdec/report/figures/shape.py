"""Draft shape against speed: a heat map of trees, a line of chains."""

from collections.abc import Sequence

import numpy as np

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
from specdec.report.shapes import Point, vertical


def tree_heat_map(points: Sequence[Point]) -> bytes:
    """Depth across, node budget (or width, if only that varies) upwards; the best is framed.

    Args:
        points: trees of one group. Where several share a cell, the fastest is shown.
    """
    part = vertical(points)
    depths = sorted({point.depth for point in points if point.depth is not None})
    others = sorted({getattr(point, part) for point in points})
    grid = np.full((len(others), len(depths)), np.nan)
    for point in points:
        where = others.index(getattr(point, part)), depths.index(point.depth or 0)
        grid[where] = np.nanmax([grid[where], point.speedup])
    figure = new_figure(1.6 + 0.55 * len(others), width=min(6.4, 3.0 + 0.7 * len(depths)))
    axes = figure.subplots()
    # One hue from light to dark: order survives grey print.
    image = axes.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    _write_values(axes, grid)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_yticks(range(len(others)), [str(other) for other in others])
    axes.set(xlabel="depth", ylabel="nodes" if part == "nodes" else "width")
    axes.set_title(label(points[0].label, 48), fontsize=10)
    figure.colorbar(image, label="speed / plain")
    return to_png(figure)


def _write_values(axes: object, grid: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    low, high = np.nanmin(grid), np.nanmax(grid)
    best = np.unravel_index(np.nanargmax(grid), grid.shape)
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        is_dark = value < (low + high) / 2
        axes.text(  # type: ignore[attr-defined]
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if is_dark else "black",
        )
    frame = Rectangle(
        (best[1] - 0.47, best[0] - 0.45), 0.94, 0.9, fill=False, edgecolor="#d55e00", linewidth=3
    )
    axes.add_patch(frame)  # type: ignore[attr-defined]


def chain_lines(groups: Sequence[Sequence[Point]]) -> bytes:
    """Speed against the length of a chain, or the node budget of a strategy without depths."""
    figure = new_figure(3.4 + 0.15 * len(groups))
    axes = figure.subplots()
    for place, points in enumerate(groups):
        ordered = sorted(points, key=lambda point: point.length or 0)
        axes.plot(
            [point.length for point in ordered],
            [point.speedup for point in ordered],
            marker=marker(place),
            color=color(place),
            linestyle=line(place),
            label=label(ordered[0].label, 34),
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="drafted tokens", ylabel="decode speed / plain decoding")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
