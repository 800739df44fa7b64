"""Pictures of draft shapes, predictions and estimates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.report.figures.style import (
    COLORS,
    GREY,
    draw_series,
    finish,
    label,
    legend_below,
    new_figure,
    to_png,
    whole_numbers,
)
from specdec.report.shapes import Point, vertical


def tree_heat_map(points: Sequence[Point]) -> bytes:
    """Draw depth across, nodes (or width) upwards; a cell shows its fastest, a frame the best."""
    part = vertical(points)
    depths = sorted({point.depth or 0 for point in points})
    others = sorted({getattr(point, part) for point in points})
    grid = np.full((len(others), len(depths)), np.nan)
    for point in points:
        where = others.index(getattr(point, part)), depths.index(point.depth or 0)
        grid[where] = np.nanmax([grid[where], point.speedup])
    width = min(6.4, 3.0 + 0.7 * len(depths))
    figure, (axes,) = new_figure(1.6 + 0.55 * len(others), width)
    # One hue from light to dark: order survives grey print.
    image = axes.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "white" if value < middle else "black"
            text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
            axes.text(column, row, f"{value:.2f}", **text)
    row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
    x, y = column + np.array([-1, 1, 1, -1, -1]) * 0.47, row + np.array([-1, -1, 1, 1, -1]) * 0.45
    axes.plot(x, y, color=COLORS[3], linewidth=3)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_yticks(range(len(others)), [str(other) for other in others])
    axes.set(xlabel="depth", ylabel=part)
    axes.set_title(label(points[0].group, 48), fontsize=10)
    figure.colorbar(image, label="speed / plain")
    return to_png(figure)


def chain_lines(groups: Sequence[Sequence[Point]]) -> bytes:
    """Draw speed against the length of a chain, or the node budget of one without depths."""
    figure, (axes,) = new_figure(3.4 + 0.15 * len(groups))
    for place, points in enumerate(groups):
        ordered = sorted(points, key=lambda point: point.length)
        lengths = [point.length for point in ordered]
        draw_series(axes, place, ordered[0].group, lengths, [point.speedup for point in ordered])
    whole_numbers(axes)
    finish(axes, "drafted tokens", "decode speed / plain decoding", line_at=1)
    legend_below(figure, axes)
    return to_png(figure)


def estimated_speed(drafters: Sequence[Any]) -> bytes:
    """Draw a line a draft model of an estimate, labeled as an estimate in the picture itself."""
    figure, (axes,) = new_figure(3.8 + 0.13 * len(drafters))
    for place, drafter in enumerate(drafters):
        lengths = [each.num_draft_tokens for each in drafter.lengths]
        speeds = [each.estimated_speedup for each in drafter.lengths]
        draw_series(axes, place, drafter.name, lengths, speeds)
    whole_numbers(axes)
    finish(axes, "drafted tokens a step", "speed / plain decoding, ESTIMATED", line_at=1)
    legend_below(figure, axes)
    return to_png(figure)


def predicted_against_measured(matches: Sequence[Any]) -> bytes:
    """Draw a point a configuration; on the diagonal the plan was right."""
    figure, (axes,) = new_figure(5.4)
    for place, kind in enumerate(dict.fromkeys(each.planned.type for each in matches)):
        some = [each for each in matches if each.planned.type == kind]
        draw_series(
            axes,
            place,
            kind,
            [each.arm.speedup_vs_plain for each in some],
            [each.planned.predicted_speedup for each in some],
            [each.planned.predicted_speedup_ci for each in some],
            [each.arm.speedup_vs_plain_ci for each in some],
            linestyle="none",
            elinewidth=0.7,
            markersize=6,
        )
    ends = [*axes.get_xlim(), *axes.get_ylim()]
    low, high = min(ends), max(ends)
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1)
    finish(axes, "measured speed / plain", "predicted speed / plain")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    legend_below(figure, axes, columns=3)
    return to_png(figure)
