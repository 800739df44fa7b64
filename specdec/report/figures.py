"""The pictures, all in the look of `style.py`."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain
from textwrap import fill
from typing import Any

import numpy as np

from specdec.analysis.results import DrafterAnalysis
from specdec.bench.log import LogEntry
from specdec.bench.results import SuiteResults
from specdec.report.runs import title_of
from specdec.report.style import (
    COLORS,
    GREY,
    HATCHES,
    draw_series,
    error_bars,
    finish,
    label,
    legend_below,
    look,
    new_figure,
    new_grid,
    to_png,
    whole_numbers,
)
from specdec.report.tables import Column, lookup, words

_BASELINES = ("plain", "hf_generate")
_EDGE = {"edgecolor": "white", "linewidth": 0.5}
# Depths from dark to light.
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef")
_DASHED = {"color": GREY, "linestyle": "--", "linewidth": 1}

Values = Sequence[float | None]


def bench_panels(results: Any) -> Any:
    """Draw speeds and acceptance of a bench or a bake-off."""
    arms = results.arms
    names = [arm.name for arm in arms if arm.name not in _BASELINES]
    places = {arm.name: names.index(arm.name) if arm.name in names else -1 for arm in arms}
    height = max(4.6, 1.6 + 0.5 * len(arms))
    figure, (left, right) = new_figure(height, width=11.5, columns=2)
    _speed_bars(left, [arm for arm in arms if arm.speedup_vs_plain is not None], places)
    drafting = [arm for arm in arms if arm.per_depth]
    for arm in drafting:
        depths = range(1, 1 + len(arm.per_depth))
        draw_series(right, places[arm.name], arm.name, depths, arm.per_depth)
    title = "Acceptance by depth (the sum is tau - 1)"
    finish(
        right,
        "depth in the draft",
        "steps that accept at this depth / all steps",
        title,
        ylim=(0, 1),
    )
    if drafting:
        whole_numbers(right)
        right.legend(fontsize=9)
    figure.suptitle(fill(title_of(results), 110), fontsize=10)
    return figure


def _speed_bars(axes: Any, arms: Sequence[Any], places: Mapping[str, int]) -> None:
    speeds = [arm.speedup_vs_plain for arm in arms]
    bars = error_bars(speeds, [arm.speedup_vs_plain_ci for arm in arms])
    colors = [look(places[arm.name])["color"] for arm in arms]
    axes.barh(range(len(arms)), speeds, xerr=bars, color=colors, ecolor="#333333", capsize=3)
    axes.axvline(1, **_DASHED)
    ends = [speed + above for speed, above in zip(speeds, bars[1], strict=True)]
    reach = max([1.0, *ends])
    for place, (arm, end) in enumerate(zip(arms, ends, strict=True)):
        text = f"{arm.speedup_vs_plain:.2f}x" + (f"   tau {arm.tau:.2f}" if arm.tau else "")
        # The box keeps the line at 1 out of the text.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(end + 0.02 * reach, place, text, va="center", fontsize=9, bbox=box, zorder=3)
    _name_bars(axes, (arm.name for arm in arms), 26)
    axes.set_title("Speed", fontsize=10)
    shown = "decode time of plain / own, all prompts (95 % interval over prompts)"
    axes.set(xlim=(0, 1.4 * reach), xlabel=shown)


def _name_bars(axes: Any, names: Iterable[str], width: int) -> None:
    """Put names beside bars, from the top down."""
    labels = [label(name, width) for name in names]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()


def group_panels(results: SuiteResults, columns: Sequence[Column], x_label: str) -> Any:
    """Draw figures of every arm over the groups of a suite, a panel a column of its tables.

    A line marks the 1 where it has a meaning; plain decoding is left out where it is 1 itself.
    """
    groups, names = results.groups, [arm.name for arm in results.groups[0].arms]
    figure, panels = new_grid(len(columns), 1, 3.3, width=10)
    ticks = [group.name.replace(" (", "\n(") for group in groups]
    for axes, column in zip(panels, columns, strict=True):
        key, scale = column.key, column.scale
        is_ratio = key.endswith(("vs_plain", "tau"))
        for place, name in list(enumerate(names, start=-1))[is_ratio:]:
            arms = [group.arms[place + 1] for group in groups]
            values = [lookup(arm, key) for arm in arms]
            # The interval, or else the range over repeats.
            ends = [lookup(arm, f"{key}_ci") or lookup(arm, f"{key}_range") for arm in arms]
            shift = 0.07 * (place + 1 - (len(names) - 1) / 2)
            draw_series(
                axes,
                place,
                name,
                [group + shift for group in range(len(groups))],
                [None if value is None else scale * value for value in values],
                [each and [scale * end for end in each] for each in ends],
            )
        is_at_1 = is_ratio or key.endswith("jain_index")
        finish(axes, x_label, title=column.heading, line_at=1 if is_at_1 else None)
        axes.set_xticks(range(len(groups)), ticks, fontsize=9)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_ylim(top=1.06 * axes.get_ylim()[1])
    legend_below(figure, panels[2], columns=min(5, len(names)))
    title = f"{title_of(results)}; bars: 95 % intervals over requests"
    figure.suptitle(fill(title, 100), fontsize=10)
    return figure


def over_time(entries: Sequence[LogEntry]) -> bytes:
    """Draw tokens/s of every arm over time; lines mark another version of specdec."""
    when = [datetime.fromisoformat(entry.date) for entry in entries]
    found = [{arm["name"]: arm["tokens_per_s"] for arm in entry.arms} for entry in entries]
    names = dict.fromkeys(chain(*found))
    series = {name: (when, [each.get(name) for each in found]) for name in names}
    figure, axes = _chart(3.4 + 0.15 * len(names), series, ("", "tokens/s"))
    axes.set_ylim(bottom=0)
    versions = [entry.version for entry in entries]
    for at, version, before in zip(when, versions, ["", *versions], strict=False):
        if version != before:
            axes.axvline(at, **_DASHED)
            axes.annotate(f" {version}", (at, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
    figure.autofmt_xdate()
    return to_png(figure, axes)


def _chart(
    height: float,
    series: Mapping[str, Iterable[Any]],
    labels: tuple[str, str],
    first: int = 0,
    line_at: float | None = None,
    **look: Any,
) -> Any:
    """Draw series, name -> arguments of `draw_series`, in one panel."""
    figure, (axes,) = new_figure(height)
    for place, (name, values) in enumerate(series.items(), start=first):
        draw_series(axes, place, name, *values, **look)
    finish(axes, *labels, line_at=line_at)
    return figure, axes


def speed_against_tau(arms: Sequence[Any]) -> bytes:
    """Draw a point an arm, and the line where a step costs what it costs in plain decoding."""
    series = {
        arm.name: ([arm.tau], [arm.speedup_vs_plain], [arm.speedup_vs_plain_ci], [arm.tau_ci])
        for arm in arms
    }
    labels = "tau, tokens per target forward", "decode speed / plain decoding"
    first = -int(arms[0].name == "plain")
    height = 4.2 + 0.13 * len(arms)
    figure, axes = _chart(height, series, labels, first, 1, markersize=8, linestyle="none")
    for key, limit in (("tau", axes.set_xlim), ("speedup_vs_plain", axes.set_ylim)):
        found = [x for a in arms for x in (lookup(a, key), *(lookup(a, f"{key}_ci") or ()))]
        low, high = min([1.0, *found]), max([1.0, *found])
        margin = 0.04 * (high - low) + 0.02
        limit(low - margin, high + margin)
    line = [1, axes.get_xlim()[1]]
    axes.plot(line, line, label="speed = tau: all else free", **_DASHED)
    return to_png(figure, axes)


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
        finish(axes, "depth in the draft", "share", title, ylim=(0, 1.02))
        whole_numbers(axes)
    return to_png(figure, panels[0])


def speed_by_length(
    lines: Mapping[str, Sequence[tuple[Any, float]]],
    x: str = "drafted tokens",
    y: str = "decode speed / plain decoding",
) -> bytes:
    """Draw lines, name -> (length of the draft, speed)."""
    series = {name: zip(*sorted(points), strict=True) for name, points in lines.items()}
    figure, axes = _chart(3.4 + 0.15 * len(lines), series, (x, y), line_at=1)
    whole_numbers(axes)
    return to_png(figure, axes)


def predicted_against_measured(matches: Sequence[Any]) -> bytes:
    """Draw a point a configuration; on the diagonal the plan was right."""
    series = {}
    for kind in dict.fromkeys(each.planned.type for each in matches):
        some = [(each.planned, each.arm) for each in matches if each.planned.type == kind]
        series[kind] = (
            [arm.speedup_vs_plain for _, arm in some],
            [planned.predicted_speedup for planned, _ in some],
            [planned.predicted_speedup_ci for planned, _ in some],
            [arm.speedup_vs_plain_ci for _, arm in some],
        )
    labels = "measured speed / plain", "predicted speed / plain"
    figure, axes = _chart(5.4, series, labels, linestyle="none", elinewidth=0.7, markersize=6)
    ends = [*axes.get_xlim(), *axes.get_ylim()]
    both = min(ends), max(ends)
    axes.plot(both, both, **_DASHED)
    axes.set(xlim=both, ylim=both, aspect="equal")
    return to_png(figure, axes, columns=3)


def expected_tau(drafters: Sequence[DrafterAnalysis]) -> bytes:
    """Draw tau against drafted tokens a step: a line of chains and one of trees a drafter."""
    figure, axes = _chart(4.0 + 0.13 * len(drafters), {}, ("drafted tokens a step", "expected tau"))
    chains, trees = {"linestyle": "-"}, {"linestyle": "--", "markerfacecolor": "white"}
    for place, drafter in enumerate(drafters):
        for kind, changes in (("chains", chains), ("trees", trees)):
            drafts = getattr(drafter.expected, kind)
            if points := sorted((each.nodes_per_step, each.tau) for each in drafts):
                x, y = zip(*points, strict=True)
                draw_series(axes, place, f"{drafter.name}, {kind}", x, y, None, None, **changes)
    return to_png(figure, axes)


def time_bars(times: Mapping[str, Mapping[str, float]]) -> bytes:
    """Draw milliseconds of an emitted token, arm -> part -> value, as stacked bars."""
    figure, (axes,) = new_figure(1.4 + 0.46 * len(times))
    left = np.zeros(len(times))
    parts = [part for part in words()["parts"] if any(part in each for each in times.values())]
    for part, color, hatch in zip(parts, COLORS, HATCHES, strict=False):
        # What no clock saw can come out a hair below nothing.
        values = np.array([max(0.0, each.get(part, 0.0)) for each in times.values()])
        bar = {"color": color, "hatch": hatch, "label": words()["parts"][part], **_EDGE}
        axes.barh(range(len(times)), values, left=left, **bar)
        left = left + values
    for place, end in enumerate(left):
        axes.text(end, place, f" {end:.2f}", va="center", fontsize=9)
    _name_bars(axes, times, 20)
    axes.set(xlim=(0, 1.13 * max(left)), xlabel="ms per emitted token")
    return to_png(figure, axes, columns=3)


def waterfalls(falls: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw a panel an arm: tau at the top, a bar a factor, the measured speedup at the end."""
    row = 0.7 + 0.23 * (2 + len(falls[0]["factors"]))
    figure, panels = new_grid(len(falls), 0.5, row, width=7.4, sharey=True)
    for axes, fall in zip(panels, falls, strict=True):
        _waterfall(axes, **fall)
    panels[0].invert_yaxis()
    figure.supxlabel("speed / plain decoding", fontsize=10)
    return to_png(figure)


def _waterfall(
    axes: Any, name: str, tau: float, factors: Mapping[str, float], measured: float
) -> None:
    last = len(factors) + 1
    axes.barh([0, last], [tau, measured], color=COLORS[0])
    highest = value = tau
    for place, factor in enumerate(factors.values(), start=1):
        after = value * factor
        color, hatch = (COLORS[3], "///") if factor < 1 else (COLORS[2], "...")
        bar = {"left": [min(value, after)], "color": color, "hatch": hatch, **_EDGE}
        axes.barh([place], [abs(after - value)], **bar)
        axes.plot([value, value], [place - 1.4, place + 0.4], color=GREY, linewidth=0.7)
        axes.text(max(value, after), place, f" × {factor:.3f}", va="center", fontsize=8)
        highest, value = max(highest, after), after
    for place, end in ((0, tau), (last, measured)):
        axes.text(end, place, f" {end:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(0, 1.3 * highest)
    axes.set_yticks(range(last + 1), ["tau", *factors, "measured"], fontsize=8)
    axes.set_title(label(name, 40), fontsize=9)


def tree_heat_map(name: str, points: Sequence[Any], part: str) -> bytes:
    """Draw depth across and `part`, nodes or width, upwards; cells show the fastest."""
    depths = sorted({point.depth for point in points})
    others = sorted({getattr(point, part) for point in points})
    grid = np.full((len(others), len(depths)), np.nan)
    for point in points:
        where = others.index(getattr(point, part)), depths.index(point.depth)
        grid[where] = np.nanmax([grid[where], point.speedup])
    figure, (axes,) = new_figure(1.6 + 0.55 * len(others), min(6.4, 3.0 + 0.7 * len(depths)))
    # One hue from light to dark: order survives grey print.
    image = axes.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for row, column in np.argwhere(~np.isnan(grid)):
        value = grid[row, column]
        color = "white" if value < middle else "black"
        text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
        axes.text(column, row, f"{value:.2f}", **text)
    row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
    x, y = column + np.array([-1, 1, 1, -1, -1]) * 0.47, row + np.array([-1, -1, 1, 1, -1]) * 0.45
    axes.plot(x, y, color=COLORS[3], linewidth=3)
    axes.set_xticks(range(len(depths)), depths)
    axes.set_yticks(range(len(others)), others)
    axes.set(xlabel="depth", ylabel=part)
    axes.set_title(label(name, 48), fontsize=10)
    figure.colorbar(image, label="speed / plain")
    return to_png(figure)


def reliability(drafters: Sequence[DrafterAnalysis]) -> bytes:
    """Draw acceptance by confidence, a panel a drafter; a marker's area is the size of its bin."""
    figure, panels = new_grid(len(drafters), 0.4, 2.9, sharex=True, sharey=True)
    for place, (axes, drafter) in enumerate(zip(panels, drafters, strict=True)):
        assert drafter.calibration is not None
        bins = [each for each in drafter.calibration.bins if each.count]
        total = sum(each.count for each in bins)
        points = [each.confidence for each in bins], [each.acceptance for each in bins]
        color = COLORS[place % len(COLORS)]
        axes.plot([0, 1], [0, 1], **_DASHED)
        axes.plot(*points, color=color, linewidth=1)
        sizes = [12 + 300 * each.count / total for each in bins]
        axes.scatter(*points, s=sizes, color=color, alpha=0.75)
        title = f"{label(drafter.name, 24)}\nECE {drafter.calibration.ece:.3f}"
        finish(axes, "", title=title, xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
    figure.supxlabel("confidence of the drafter", fontsize=10)
    figure.supylabel("acceptance by the target", fontsize=10)
    return to_png(figure)


def curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw loss and held-out acceptance of a training run, rows of its log."""
    steps, evaluations = (
        [each for each in records if each["kind"] == kind] for kind in ("step", "evaluation")
    )
    figure, (left, right) = new_figure(4.4, width=11, columns=2)
    places, losses = ([each[key] for each in steps] for key in ("step", "loss"))
    left.plot(places, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    left.plot(places, _smoothed(losses), color=COLORS[0], label="training (smoothed)")
    finish(left, "step", "loss", "Loss")
    title = "Offline acceptance on held-out rows"
    finish(right, "step", "share of tested depths", title, ylim=(0, 1))
    if evaluations:
        keys = ("step", "validation_loss", "acceptance", "tau")
        at, held_out, acceptance, taus = ([each[key] for each in evaluations] for key in keys)
        left.plot(at, held_out, "o-", color=COLORS[1], label="held-out rows")
        for depth, values in enumerate(np.array(acceptance, dtype=float).T):
            shade = _SHADES[min(depth, len(_SHADES) - 1)]
            right.plot(at, values, ".-", color=shade, label=f"depth {depth + 1}")
        right.legend(loc="lower right", ncols=2, fontsize=8)
        beside = right.twinx()
        beside.plot(at, taus, "s--", color=COLORS[2])
        beside.set_ylim(bottom=1)
        beside.set_ylabel("offline tau (dashed)", color=COLORS[2])
    else:
        right.text(0.5, 0.5, "no held-out rows", ha="center", transform=right.transAxes)
    left.legend()
    return to_png(figure)


def _smoothed(values: Sequence[float]) -> Any:
    """Average exponentially over about a fiftieth of the run, without the pull of its start."""
    from scipy.signal import lfilter

    weight = 1 - 1 / max(1.0, len(values) / 50)
    return lfilter([1 - weight], [1, -weight], values) / (
        1 - weight ** np.arange(1, len(values) + 1)
    )
