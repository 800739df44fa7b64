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

Interval = Sequence[float] | None


_DODGE = 0.06  # between the bars of two arms, in groups


def speed_by_group(
    names: Sequence[str],
    lines: Mapping[str, Sequence[float | None]],
    intervals: Mapping[str, Sequence[Interval]],
) -> bytes:
    """A line an arm over the groups in their order, with bars for its intervals.

    Args:
        names: of the groups.
        lines: arm -> speed over plain decoding in each group; None where it has none.
        intervals: arm -> the lowest and highest it may be; None where it is not known.
    """
    figure = new_figure(3.8 + 0.13 * len(lines))
    axes = figure.subplots()
    for place, (name, values) in enumerate(lines.items()):
        shift = _DODGE * (place - (len(lines) - 1) / 2)
        speeds = [float("nan") if value is None else value for value in values]
        axes.errorbar(
            [group + shift for group in range(len(values))],
            speeds,
            yerr=_reach(speeds, intervals[name]),
            capsize=2,
            elinewidth=1,
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


def _reach(speeds: Sequence[float], intervals: Sequence[Interval]) -> list[list[float]]:
    """From each speed down to and up to the ends of its interval."""
    ends = [interval or (x, x) for x, interval in zip(speeds, intervals, strict=True)]
    pairs = list(zip(speeds, ends, strict=True))
    below = [max(0.0, x - low) for x, (low, _) in pairs]
    return [below, [max(0.0, high - x) for x, (_, high) in pairs]]
