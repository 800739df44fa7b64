"""The log of a training run as a picture: losses beside offline acceptance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREEN = "#0072b2", "#e69f00", "#009e73"
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef")


def plot_curves(log: Path, path: Path) -> None:
    """Write a PNG of a `log.jsonl`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib; install it with: pip install 'specdec[plot]'"
        ) from error
    records = [json.loads(line) for line in log.read_text().splitlines()]
    draw_curves(records, Figure).savefig(path, dpi=130)


def draw_curves(records: Sequence[dict[str, Any]], figure_class: Any) -> Any:
    """The figure, of matplotlib's class `Figure`."""
    steps = [each for each in records if each["kind"] == "step"]
    evaluations = [each for each in records if each["kind"] == "evaluation"]
    figure = figure_class(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, steps, evaluations)
    _acceptance(right, evaluations)
    return figure


def _losses(axes: Any, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    places = [each["step"] for each in steps]
    losses = [each["loss"] for each in steps]
    axes.plot(places, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(places, _smoothed(losses), color=_BLUE, label="training (smoothed)")
    if evaluations:
        held_out = [each["validation_loss"] for each in evaluations]
        axes.plot(_steps(evaluations), held_out, "o-", color=_ORANGE, label="held-out rows")
    axes.set(xlabel="step", ylabel="loss", title="Loss")
    axes.legend()


def _acceptance(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    axes.set(xlabel="step", ylabel="share of tested depths", ylim=(0, 1))
    axes.set_title("Offline acceptance on held-out rows")
    if not evaluations:
        axes.text(0.5, 0.5, "no held-out rows", ha="center", transform=axes.transAxes)
        return
    for depth, values in enumerate(zip(*(e["acceptance"] for e in evaluations), strict=True)):
        shade = _SHADES[min(depth, len(_SHADES) - 1)]
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(_steps(evaluations), shown, ".-", color=shade, label=f"depth {depth + 1}")
    axes.legend(loc="lower right", ncols=2, fontsize=8)
    beside = axes.twinx()
    beside.plot(_steps(evaluations), [e["tau"] for e in evaluations], "s--", color=_GREEN)
    beside.set_ylim(bottom=1)
    beside.set_ylabel("offline tau (dashed)", color=_GREEN)


def _steps(records: list[dict[str, Any]]) -> list[int]:
    return [each["step"] for each in records]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the run, without the pull of its start."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(mean / norm)
    return smoothed
