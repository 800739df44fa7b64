"""Speed of a suite's arms by group."""

from collections.abc import Mapping, Sequence

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


def speed_by_group(names: Sequence[str], lines: Mapping[str, Sequence[float | None]]) -> bytes:
    """A line an arm over the groups in their order.

    Args:
        names: of the groups.
        lines: arm -> speed over plain decoding in each group; None where it has none.
    """
    figure = new_figure(3.8 + 0.13 * len(lines))
    axes = figure.subplots()
    for place, (name, values) in enumerate(lines.items()):
        axes.plot(
            range(len(values)),
            [float("nan") if value is None else value for value in values],
            marker=marker(place),
            color=color(place),
            linestyle=line(place),
            label=label(name, 34),
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    crowded = len(names) > 4
    axes.set_xticks(
        range(len(names)),
        [label(name, 14) for name in names],
        fontsize=8,
        rotation=45 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.set_ylabel("decode speed / plain decoding")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
