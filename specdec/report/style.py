"""The look of all pictures, readable in print and without color. Only here is matplotlib imported.

A series has a place, from which it gets its color, marker and line; plain decoding is at -1.
"""

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill
from typing import Any

import numpy as np

from specdec.common.distribution import install

# Okabe and Ito's colors, which stay apart for color-blind readers.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
MARKERS = "osD^vP*X<>"
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
GREY = "#666666"

Interval = Sequence[float] | None


def new_figure(
    height: float, width: float = 6.4, rows: int = 1, columns: int = 1, **shared: Any
) -> Any:
    """Make a figure and its panels, row by row; `shared` may hold `sharex` and `sharey`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"pictures need matplotlib; install it with: {install('plot')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def new_grid(num: int, base: float, row: float, width: float = 6.4, **shared: Any) -> Any:
    """Make a figure with panels two in a row, which adds to the height of its base."""
    rows = -(-num // 2)
    figure, panels = new_figure(base + rows * row, width, rows, 2, **shared)
    for axes in panels[num:]:
        axes.set_visible(False)
    return figure, panels[:num]


def to_png(figure: Any, legend_of: Any = None, columns: int = 2) -> bytes:
    """Draw it, with the legend of a panel below all panels.

    Version and date are left out, for they change the bytes of the same picture.
    """
    if legend_of is not None:
        legend_below(figure, legend_of, columns)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def look(place: int) -> dict[str, Any]:
    if place < 0:
        return {"color": GREY, "marker": "x", "linestyle": "-"}
    looks = {"color": COLORS, "marker": MARKERS, "linestyle": LINES}
    return {name: choices[place % len(choices)] for name, choices in looks.items()}


def label(text: str, width: int = 34) -> str:
    """Break a name into lines; a dollar sign begins no formula."""
    return fill(text, width).replace("$", r"\$")


def error_bars(values: Sequence[float], intervals: Sequence[Interval]) -> Any:
    """Give lengths below and above, [2, values]; 0 where there is no interval."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    lengths = [(v - low, high - v) for v, (low, high) in zip(values, ends, strict=True)]
    return np.maximum(np.reshape(lengths, (-1, 2)).T, 0)


def draw_series(
    axes: Any,
    place: int,
    name: str,
    x: Sequence[Any],
    y: Sequence[float | None],
    y_intervals: Sequence[Interval] | None = None,
    x_intervals: Sequence[Interval] | None = None,
    **changes: Any,
) -> None:
    """Draw points with their intervals, joined by a line; points without a value are left out."""
    bars = [each or [None] * len(x) for each in (x_intervals, y_intervals)]
    known = [row for row in zip(x, y, *bars, strict=True) if row[1] is not None]
    xs, ys, x_ends, y_ends = zip(*known, strict=True) if known else ((), (), (), ())
    usual = {"markersize": 5, "linewidth": 1.4, "elinewidth": 1, "capsize": 2, **look(place)}
    axes.errorbar(
        xs,
        ys,
        xerr=error_bars(xs, x_ends) if x_intervals else None,
        yerr=error_bars(ys, y_ends) if y_intervals else None,
        label=label(name),
        **(usual | changes),
    )


def finish(
    axes: Any, x: str, y: str = "", title: str = "", line_at: float | None = None, **more: Any
) -> None:
    """Label a panel; `line_at` marks a height to compare with, as 1 for plain decoding."""
    axes.set(xlabel=x, ylabel=y, **more)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if line_at is not None:
        axes.axhline(line_at, color=GREY, linewidth=0.8)


def whole_numbers(axes: Any) -> None:
    """Put ticks of the horizontal axis at whole numbers alone."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def legend_below(figure: Any, axes: Any, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
