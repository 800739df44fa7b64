"""Where the time went, and where the speedup went."""

from collections.abc import Sequence
from typing import Any

from specdec.report.breakdown import PART_NAMES, PARTS, Breakdown, Waterfall
from specdec.report.figures.style import (
    COLORS,
    GREY,
    HATCHES,
    label,
    legend_below,
    new_figure,
    to_png,
)

_TOTAL, _LOSS, _GAIN = "#0072b2", "#d55e00", "#009e73"


def time_bars(arms: Sequence[Breakdown]) -> bytes:
    """Stacked bars: milliseconds of an emitted token by part, plain decoding among them."""
    figure = new_figure(1.4 + 0.46 * len(arms))
    axes = figure.subplots()
    left = [0.0] * len(arms)
    parts = [part for part in PARTS if any(part in arm.step_ms for arm in arms)]
    for place, part in enumerate(parts):
        # What no clock saw can come out a hair below nothing.
        values = [max(0.0, arm.token_ms.get(part, 0.0)) for arm in arms]
        axes.barh(
            range(len(arms)),
            values,
            left=left,
            color=COLORS[place],
            hatch=HATCHES[place],
            edgecolor="white",
            linewidth=0.5,
            label=PART_NAMES[part],
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, end in enumerate(left):
        axes.text(end, place, f" {end:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(arms)), [label(arm.name, 20) for arm in arms], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(left))
    axes.set_xlabel("ms per emitted token")
    legend_below(figure, axes, columns=3)
    return to_png(figure)


def waterfalls(arms: Sequence[Waterfall]) -> bytes:
    """A panel an arm: tau at the top, a bar for each factor, the measured speedup at the end."""
    num_rows = -(-len(arms) // 2)
    num_bars = 2 + max(len(arm.factors) for arm in arms)
    figure = new_figure(0.5 + num_rows * (0.7 + 0.23 * num_bars), width=7.4)
    panels = figure.subplots(num_rows, 2, squeeze=False, sharey=True).ravel()
    for axes, arm in zip(panels, arms, strict=False):
        _one_waterfall(axes, arm)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel("speed / plain decoding", fontsize=10)
    return to_png(figure)


def _one_waterfall(axes: Any, arm: Waterfall) -> None:
    names, value = ["tau"], arm.tau
    axes.barh([0], [value], color=_TOTAL)
    axes.text(value, 0, f" {value:.2f}", va="center", fontsize=8)
    highest = value
    for place, (name, factor) in enumerate(arm.factors, start=1):
        after = value * factor
        is_loss = factor < 1
        axes.barh(
            [place],
            [abs(after - value)],
            left=[min(value, after)],
            color=_LOSS if is_loss else _GAIN,
            hatch="///" if is_loss else "...",
            edgecolor="white",
            linewidth=0.5,
        )
        axes.plot([value, value], [place - 1.4, place + 0.4], color=GREY, linewidth=0.7)
        axes.text(max(value, after), place, f" × {factor:.3f}", va="center", fontsize=8)
        names.append(name)
        highest, value = max(highest, after), after
    axes.barh([len(names)], [arm.measured], color=_TOTAL)
    axes.text(arm.measured, len(names), f" {arm.measured:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(0, 1.3 * highest)
    axes.set_yticks(range(len(names) + 1), [*names, "measured"], fontsize=8)
    axes.set_title(label(arm.name, 40), fontsize=9)
