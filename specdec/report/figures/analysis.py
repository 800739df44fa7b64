"""Pictures of an analysis, and of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.analysis.results import DrafterAnalysis
from specdec.common.files import replace_file
from specdec.report.figures.style import (
    COLORS,
    GREY,
    draw_series,
    finish,
    label,
    legend_below,
    new_figure,
    to_png,
)

# Depths from dark to light.
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef")


def reliability(drafters: Sequence[DrafterAnalysis]) -> bytes:
    """Draw acceptance by confidence, a panel a drafter; a marker's area is the size of its bin."""
    rows = -(-len(drafters) // 2)
    figure, panels = new_figure(0.4 + 2.9 * rows, rows=rows, columns=2, sharex=True, sharey=True)
    for place, (axes, drafter) in enumerate(zip(panels, drafters, strict=False)):
        assert drafter.calibration is not None
        bins = [each for each in drafter.calibration.bins if each.count]
        total = sum(each.count for each in bins)
        confidence = [each.confidence for each in bins]
        acceptance = [each.acceptance for each in bins]
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        color = COLORS[place % len(COLORS)]
        axes.plot(confidence, acceptance, color=color, linewidth=1)
        sizes = [12 + 300 * each.count / total for each in bins]
        axes.scatter(confidence, acceptance, s=sizes, color=color, alpha=0.75)
        finish(axes, "", title=f"{label(drafter.name, 24)}\nECE {drafter.calibration.ece:.3f}")
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
    for axes in panels[len(drafters) :]:
        axes.set_visible(False)
    figure.supxlabel("confidence of the drafter", fontsize=10)
    figure.supylabel("acceptance by the target", fontsize=10)
    return to_png(figure)


def expected_tau(drafters: Sequence[DrafterAnalysis]) -> bytes:
    """Draw tau against drafted tokens a step: a line of chains and one of trees a drafter."""
    figure, (axes,) = new_figure(4.0 + 0.13 * len(drafters))
    for place, drafter in enumerate(drafters):
        chains: dict[str, Any] = {"linestyle": "-"}
        trees: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
        for key, look in (("chains", chains), ("trees", trees)):
            found = getattr(drafter.expected, key)
            if found:
                drafts = sorted(found, key=lambda each: each.nodes_per_step)
                nodes = [each.nodes_per_step for each in drafts]
                taus = [each.tau for each in drafts]
                draw_series(axes, place, f"{drafter.name}, {key}", nodes, taus, **look)
    finish(axes, "drafted tokens a step", "expected tau")
    legend_below(figure, axes)
    return to_png(figure)


def plot_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write loss and held-out acceptance of a training run, rows of its log, as a PNG."""
    steps = [each for each in records if each["kind"] == "step"]
    evaluations = [each for each in records if each["kind"] == "evaluation"]
    figure, (left, right) = new_figure(4.4, width=11, columns=2)
    places, losses = ([each[key] for each in steps] for key in ("step", "loss"))
    left.plot(places, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    left.plot(places, _smoothed(losses), color=COLORS[0], label="training (smoothed)")
    if evaluations:
        held_out = [each["validation_loss"] for each in evaluations]
        at = [each["step"] for each in evaluations]
        left.plot(at, held_out, "o-", color=COLORS[1], label="held-out rows")
    finish(left, "step", "loss", "Loss")
    left.legend()
    _held_out_acceptance(right, evaluations)
    replace_file(path, to_png(figure))


def _held_out_acceptance(axes: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    finish(axes, "step", "share of tested depths", "Offline acceptance on held-out rows")
    axes.set_ylim(0, 1)
    if not evaluations:
        axes.text(0.5, 0.5, "no held-out rows", ha="center", transform=axes.transAxes)
        return
    at = [each["step"] for each in evaluations]
    by_depth = zip(*(each["acceptance"] for each in evaluations), strict=True)
    for depth, values in enumerate(by_depth):
        shown = [float("nan") if value is None else value for value in values]
        shade = _SHADES[min(depth, len(_SHADES) - 1)]
        axes.plot(at, shown, ".-", color=shade, label=f"depth {depth + 1}")
    axes.legend(loc="lower right", ncols=2, fontsize=8)
    beside = axes.twinx()
    beside.plot(at, [each["tau"] for each in evaluations], "s--", color=COLORS[2])
    beside.set_ylim(bottom=1)
    beside.set_ylabel("offline tau (dashed)", color=COLORS[2])


def _smoothed(values: Sequence[float]) -> list[float]:
    """Average exponentially over about a fiftieth of the run, without the pull of its start."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(mean / norm)
    return smoothed
