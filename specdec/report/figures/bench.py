"""Pictures of benches and suites."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from specdec.bench.results import BenchResults, SuiteResults
from specdec.common.files import replace_file
from specdec.report.breakdown import PARTS, Breakdown, Waterfall
from specdec.report.figures.style import (
    COLORS,
    GREY,
    HATCHES,
    Interval,
    draw_series,
    error_bars,
    finish,
    label,
    legend_below,
    look,
    new_figure,
    to_png,
    whole_numbers,
)
from specdec.report.runs import title_of
from specdec.report.tables import Column, lookup

_BASELINES = ("plain", "hf_generate")
Values = Sequence[float | None]


def plot_results(results: BenchResults, path: Path) -> None:
    """Write the picture of a bench, speed beside acceptance by depth, as a PNG."""
    replace_file(path, to_png(bench_panels(results)))


def bench_panels(results: BenchResults) -> Any:
    """Draw every arm's speed, and its acceptance by depth."""
    arms = results.arms
    names = [arm.name for arm in arms if arm.name not in _BASELINES]
    places = {arm.name: names.index(arm.name) if arm.name in names else -1 for arm in arms}
    height = max(4.6, 1.6 + 0.5 * len(arms))
    figure, (left, right) = new_figure(height, width=11.5, columns=2)
    _speed_bars(left, [arm for arm in arms if arm.speedup_vs_plain is not None], places)
    for arm in arms:
        if arm.per_depth:
            depths = range(1, 1 + len(arm.per_depth))
            draw_series(right, places[arm.name], arm.name, depths, arm.per_depth)
    finish(right, "depth in the draft", "steps that accept at this depth / all steps")
    right.set_title("Acceptance by depth (the sum is tau - 1)", fontsize=10)
    right.set_ylim(0, 1)
    if any(arm.per_depth for arm in arms):
        whole_numbers(right)
        right.legend(fontsize=9)
    figure.suptitle(fill(title_of(results), 110), fontsize=10)
    return figure


def _speed_bars(axes: Any, arms: Sequence[Any], places: dict[str, int]) -> None:
    speeds = [arm.speedup_vs_plain for arm in arms]
    bars = error_bars(speeds, [arm.speedup_vs_plain_ci for arm in arms])
    colors = [look(places[arm.name])["color"] for arm in arms]
    axes.barh(range(len(arms)), speeds, xerr=bars, color=colors, ecolor="#333333", capsize=3)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    ends = [speed + above for speed, above in zip(speeds, bars[1], strict=True)]
    reach = max([1.0, *ends])
    for place, (arm, end) in enumerate(zip(arms, ends, strict=True)):
        text = f"{arm.speedup_vs_plain:.2f}x" + (f"   tau {arm.tau:.2f}" if arm.tau else "")
        # The box keeps the line at 1 out of the text.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(end + 0.02 * reach, place, text, va="center", fontsize=9, bbox=box, zorder=3)
    axes.set_yticks(range(len(arms)), [label(arm.name, 26) for arm in arms], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * reach)
    axes.set_xlabel("decode time of plain / own, all prompts (95 % interval over prompts)")
    axes.set_title("Speed", fontsize=10)


def group_panels(results: SuiteResults, columns: Sequence[Column], x_label: str, title: str) -> Any:
    """Draw figures of every arm over the groups of a suite, a panel a column of its tables.

    A line marks the 1 where it has a meaning; plain decoding is left out where it is 1 itself.
    """
    groups, names = results.groups, [arm.name for arm in results.groups[0].arms]
    rows = (len(columns) + 1) // 2
    figure, panels = new_figure(3.3 * rows + 1, width=10, rows=rows, columns=2)
    ticks = [group.name.replace(" (", "\n(") for group in groups]
    for axes, column in zip(panels, columns, strict=True):
        is_ratio = column.key.endswith(("vs_plain", "tau"))
        for place, name in enumerate(names, start=-1):
            if place >= 0 or not is_ratio:
                shift = 0.07 * (place + 1 - (len(names) - 1) / 2)
                arms = [group.arms[place + 1] for group in groups]
                x = [group + shift for group in range(len(groups))]
                values, intervals = zip(*(_scaled(arm, column) for arm in arms), strict=True)
                draw_series(axes, place, name, x, values, intervals)
        is_at_1 = is_ratio or column.key.endswith("jain_index")
        finish(axes, x_label, title=column.heading, line_at=1 if is_at_1 else None)
        axes.set_xticks(range(len(groups)), ticks, fontsize=9)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_ylim(top=1.06 * axes.get_ylim()[1])
    legend_below(figure, panels[2], columns=min(5, len(names)))
    figure.suptitle(fill(f"{title}; bars: 95 % intervals over requests", 100), fontsize=10)
    return figure


def _scaled(arm: Any, column: Column) -> tuple[float | None, Interval]:
    """Give a value as it is shown, with its interval, or else its range over repeats."""
    value = lookup(arm, column.key)
    ends = lookup(arm, f"{column.key}_ci") or lookup(arm, f"{column.key}_range")
    return (
        None if value is None else column.scale * value,
        ends and [column.scale * end for end in ends],
    )


def speed_against_tau(arms: Sequence[Any]) -> bytes:
    """Draw a point an arm, and the line where a step costs what it costs in plain decoding."""
    figure, (axes,) = new_figure(4.2 + 0.13 * len(arms))
    for place, arm in enumerate(arms, start=-int(arms[0].name == "plain")):
        draw_series(
            axes,
            place,
            arm.name,
            [arm.tau],
            [arm.speedup_vs_plain],
            [arm.speedup_vs_plain_ci],
            [arm.tau_ci],
            markersize=8,
            linestyle="none",
        )
    left, right = _limits(x for arm in arms for x in (arm.tau, *(arm.tau_ci or ())))
    free = "speed = tau: all else free"
    axes.plot([1, right], [1, right], color=GREY, linestyle="--", linewidth=1, label=free)
    finish(axes, "tau, tokens per target forward", "decode speed / plain decoding", line_at=1)
    speeds = (x for a in arms for x in (a.speedup_vs_plain, *(a.speedup_vs_plain_ci or ())))
    axes.set(xlim=(left, right), ylim=_limits(speeds))
    legend_below(figure, axes)
    return to_png(figure)


def _limits(values: Any) -> tuple[float, float]:
    """Give limits that hold 1 and every value."""
    found = [1.0, *values]
    margin = 0.04 * (max(found) - min(found)) + 0.02
    return min(found) - margin, max(found) + margin


def acceptance_by_depth(curves: Sequence[tuple[str, Values, Values]]) -> bytes:
    """Draw (name, unconditional, conditional) by depth, a panel each, one above the other."""
    titles = ("accepted at this depth / all steps", "accepted / steps that tested it")
    figure, panels = new_figure(6.4 + 0.13 * len(curves), rows=2)
    for which, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for place, (name, *shares) in enumerate(curves):
            # Curves that coincide stay visible: the later ones are thinner.
            width = 2.6 - 1.6 * place / max(1, len(curves) - 1)
            depths = range(1, 1 + len(shares[which]))
            draw_series(axes, place, name, depths, shares[which], linewidth=width)
        finish(axes, "depth in the draft", "share", title)
        axes.set_ylim(0, 1.02)
        whole_numbers(axes)
    legend_below(figure, panels[0])
    return to_png(figure)


def time_bars(arms: Sequence[Breakdown]) -> bytes:
    """Draw milliseconds of an emitted token by part as stacked bars."""
    figure, (axes,) = new_figure(1.4 + 0.46 * len(arms))
    left = [0.0] * len(arms)
    parts = [part for part in PARTS if any(part in arm.step_ms for arm in arms)]
    for place, part in enumerate(parts):
        # What no clock saw can come out a hair below nothing.
        values = [max(0.0, arm.token_ms.get(part, 0.0)) for arm in arms]
        bar = {"color": COLORS[place], "hatch": HATCHES[place], "label": PARTS[part]}
        axes.barh(range(len(arms)), values, left=left, edgecolor="white", linewidth=0.5, **bar)
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
    """Draw a panel an arm: tau at the top, a bar a factor, the measured speedup at the end."""
    rows = -(-len(arms) // 2)
    num_bars = 2 + len(arms[0].factors)
    height = 0.5 + rows * (0.7 + 0.23 * num_bars)
    figure, panels = new_figure(height, width=7.4, rows=rows, columns=2, sharey=True)
    for axes, arm in zip(panels, arms, strict=False):
        _waterfall(axes, arm)
    panels[0].invert_yaxis()
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    figure.supxlabel("speed / plain decoding", fontsize=10)
    return to_png(figure)


def _waterfall(axes: Any, arm: Waterfall) -> None:
    names = ["tau", *arm.factors, "measured"]
    highest = value = arm.tau
    total = {"color": COLORS[0]}
    axes.barh([0, len(names) - 1], [arm.tau, arm.measured], **total)
    for place, factor in enumerate(arm.factors.values(), start=1):
        after = value * factor
        color, hatch = (COLORS[3], "///") if factor < 1 else (COLORS[2], "...")
        bar = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        axes.barh([place], [abs(after - value)], left=[min(value, after)], **bar)
        axes.plot([value, value], [place - 1.4, place + 0.4], color=GREY, linewidth=0.7)
        axes.text(max(value, after), place, f" × {factor:.3f}", va="center", fontsize=8)
        highest, value = max(highest, after), after
    for place, end in ((0, arm.tau), (len(names) - 1, arm.measured)):
        axes.text(end, place, f" {end:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(0, 1.3 * highest)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(label(arm.name, 40), fontsize=9)
