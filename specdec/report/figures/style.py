"""How all pictures look: readable in print, without colour, and on a small screen."""

from io import BytesIO
from textwrap import fill
from typing import Any

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
MARKERS = "osD^vP*X<>"
# Grey print tells bars apart by these.
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
LINES = ("-", "--", "-.", ":")
GREY = "#666666"
WIDTH = 6.4  # inches; a phone shows it at about half that
_DPI = 130


def new_figure(height: float, width: float = WIDTH) -> Any:
    """An empty figure.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "a report needs matplotlib for its pictures; install it with: pip install "
            "'specdec[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Any) -> bytes:
    """Draw it."""
    content = BytesIO()
    # Without the version and the date, which would change the bytes of the same picture.
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def color(place: int) -> str:
    """Of the arm or drafter at this place."""
    return COLORS[place % len(COLORS)]


def marker(place: int) -> str:
    """Of the arm or drafter at this place; with the colour it is unique for long."""
    return MARKERS[place % len(MARKERS)]


def line(place: int) -> str:
    """Line style of the arm or drafter at this place."""
    return LINES[place % len(LINES)]


def label(text: str, width: int = 24) -> str:
    """A name on as many lines as it needs; a dollar sign is no formula."""
    return fill(text, width).replace("$", r"\$")


def error_bars(value: float, interval: Any) -> list[list[float]]:
    """As matplotlib takes them; none where there is no interval."""
    low, high = interval or (value, value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def legend_below(figure: Any, axes: Any, columns: int = 2) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
