"""Speed against tau."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.report.derived import PART_NAMES, PARTS, Breakdown, Match, Point, Waterfall, vertical
from specdec.report.figures.style import (
    COLORS,
    GREY,
    HATCHES,
    color,
    error_bars,
    label,
    legend_below,
    line,
    marker,
    new_figure,
    to_png,
)


def speed_against_tau(arms: Sequence[dict[str, Any]]) -> bytes:
    """One point an arm, with both intervals, and the line where a step costs what it would plain.

    Args:
        arms: with a tau and a speedup.
    """
    figure = new_figure(4.2 + 0.13 * len(arms))
    axes = figure.subplots()
    for place, arm in enumerate(arms, start=-int(arms[0]["name"] == "plain")):
        tau, speed = arm["tau"], arm["speedup_vs_plain"]
        axes.errorbar(
            [tau],
            [speed],
            xerr=error_bars(tau, arm["tau_ci"]),
            yerr=error_bars(speed, arm["speedup_vs_plain_ci"]),
            marker=marker(place),
            color=GREY if place < 0 else color(place),
            markersize=8,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=label(arm["name"], 34),
        )
    left, right = _reach(arms, "tau")
    low, high = _reach(arms, "speedup_vs_plain")
    free = "speed = tau: all else free"
    axes.plot([1, right], [1, right], color=GREY, linestyle="--", linewidth=1, label=free)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="tau, tokens per target forward", ylabel="decode speed / plain decoding")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)


def _reach(arms: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Limits that hold 1, every value and its interval."""
    values = [1.0, *(value for arm in arms for value in (arm[key], *(arm[f"{key}_ci"] or ())))]
    margin = 0.04 * (max(values) - min(values)) + 0.02
    return min(values) - margin, max(values) + margin


def estimated_speed(drafters: Sequence[dict[str, Any]]) -> bytes:
    """A line a draft model, marked as an estimate in the picture itself.

    Args:
        drafters: of an estimate, at one batch size.
    """
    figure = new_figure(3.8 + 0.13 * len(drafters))
    axes = figure.subplots()
    for place, drafter in enumerate(drafters):
        axes.plot(
            [each["num_draft_tokens"] for each in drafter["lengths"]],
            [each["estimated_speedup"] for each in drafter["lengths"]],
            marker=marker(place),
            markersize=5,
            color=color(place),
            linestyle=line(place),
            label=label(drafter["name"], 34),
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="drafted tokens a step", ylabel="speed / plain decoding, ESTIMATED")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)


def predicted_against_measured(matches: Sequence[Match]) -> bytes:
    """One point a configuration, with both intervals; on the diagonal the plan was right."""
    types = list(dict.fromkeys(each.configuration["type"] for each in matches))
    figure = new_figure(5.4)
    axes = figure.subplots()
    for place, kind in enumerate(types):
        for index, each in enumerate(m for m in matches if m.configuration["type"] == kind):
            axes.errorbar(
                [each.measured],
                [each.predicted],
                xerr=error_bars(each.measured, each.arm["speedup_vs_plain_ci"]),
                yerr=error_bars(each.predicted, each.configuration.get("predicted_speedup_ci")),
                marker=marker(place),
                color=color(place),
                markersize=6,
                linestyle="none",
                elinewidth=0.7,
                label="_" if index else label(kind),
            )
    low, high = _reach_of_prediction(matches)
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="measured speed / plain", ylabel="predicted speed / plain")
    axes.grid(alpha=0.3)
    legend_below(figure, axes, columns=3)
    return to_png(figure)


def _reach_of_prediction(matches: Sequence[Match]) -> tuple[float, float]:
    """Limits that hold every point with its intervals."""
    values = [value for each in matches for value in (each.measured, each.predicted)]
    for each in matches:
        values += each.arm["speedup_vs_plain_ci"] or ()
        values += each.configuration.get("predicted_speedup_ci") or ()
    margin = 0.04 * (max(values) - min(values)) + 0.01
    return min(values) - margin, max(values) + margin


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
            yerr=_reach_of_suite(speeds, intervals[name]),
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


def _reach_of_suite(speeds: Sequence[float], intervals: Sequence[Interval]) -> list[list[float]]:
    """From each speed down to and up to the ends of its interval."""
    ends = [interval or (x, x) for x, interval in zip(speeds, intervals, strict=True)]
    pairs = list(zip(speeds, ends, strict=True))
    below = [max(0.0, x - low) for x, (low, _) in pairs]
    return [below, [max(0.0, high - x) for x, (_, high) in pairs]]


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
