"""The results of a bench as a picture: speed beside acceptance by depth."""

from pathlib import Path
from textwrap import fill
from typing import Any

from specdec.report.title import results_title

# Okabe and Ito's colours, which stay apart for colour-blind readers too; baselines are grey.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_MARKERS = "osD^vP*X"
_BASELINE_COLOR = "#999999"
_NUM_BASELINES = 2


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib; install it with: pip install 'specdec[plot]'"
        ) from error
    draw(results, Figure).savefig(path, dpi=130)


def draw(results: dict[str, Any], figure_class: Any) -> Any:
    """The figure, of matplotlib's class `Figure`."""
    arms = results["arms"]
    figure = figure_class(figsize=(11.5, max(4.6, 1.6 + 0.5 * len(arms))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speed(left, arms)
    _acceptance(right, arms)
    figure.suptitle(fill(results_title(results), 110), fontsize=10)
    return figure


def _color(arm: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    """The arm's colour, the same in both panels."""
    place = arms.index(arm) - _NUM_BASELINES
    return _BASELINE_COLOR if place < 0 else _COLORS[place % len(_COLORS)]


def _label(arm: dict[str, Any]) -> str:
    return fill(arm["name"], 26)


def _speed(axes: Any, arms: list[dict[str, Any]]) -> None:
    shown = [arm for arm in arms if arm["speedup_vs_plain"] is not None]
    values = [arm["speedup_vs_plain"] for arm in shown]
    intervals = [arm["speedup_vs_plain_ci"] or (v, v) for arm, v in zip(shown, values, strict=True)]
    below = [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)]
    places = range(len(shown))
    axes.barh(
        places,
        values,
        xerr=[below, above],
        color=[_color(arm, arms) for arm in shown],
        ecolor="#333333",
        capsize=3,
    )
    axes.axvline(1.0, color="#666666", linewidth=1, linestyle="--")
    reach = max([1.0, *(v + a for v, a in zip(values, above, strict=True))])
    for place, arm, value, extra in zip(places, shown, values, above, strict=True):
        label = f"{value:.2f}x" + (f"   tau {arm['tau']:.2f}" if arm["tau"] else "")
        # The box keeps the line at 1 out of the text.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(
            value + extra + 0.02 * reach, place, label, va="center", fontsize=9, bbox=box, zorder=3
        )
    axes.set_yticks(places, [_label(arm) for arm in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * reach)
    axes.set_xlabel("decode time of plain / own, all prompts (95 % interval over prompts)")
    axes.set_title("Speed")


def _acceptance(axes: Any, arms: list[dict[str, Any]]) -> None:
    drafted = [arm for arm in arms if arm["per_depth"]]
    for place, arm in enumerate(drafted):
        axes.plot(
            range(1, len(arm["per_depth"]) + 1),
            arm["per_depth"],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            color=_color(arm, arms),
            # Curves that coincide stay visible: the later ones are thinner.
            linewidth=3 - 2 * place / max(1, len(drafted) - 1),
            label=_label(arm),
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth in the draft")
    axes.set_ylabel("steps that accept at this depth / all steps")
    axes.set_title("Acceptance by depth (the sum is tau - 1)")
    axes.grid(alpha=0.3)
    if drafted:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=9)
