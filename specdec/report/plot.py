"""The results of a bench as a picture: speed beside acceptance by depth."""

from pathlib import Path
from typing import Any


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
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speed(left, results["arms"])
    _acceptance(right, results["arms"])
    where = results["provenance"]
    config = where["config"]
    figure.suptitle(
        f"{config['target']['path']}, {where['dtype']}, {where['device']}, batch "
        f"{config['batch_size']}, T = {config['sampling']['temperature']:g}, "
        f"{results['arms'][0]['prompts']} {config['prompts']['source']} prompts",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _speed(axes: Any, arms: list[dict[str, Any]]) -> None:
    shown = [arm for arm in arms if arm["speedup_vs_plain"] is not None]
    values = [arm["speedup_vs_plain"] for arm in shown]
    intervals = [arm["speedup_vs_plain_ci"] or (v, v) for arm, v in zip(shown, values, strict=True)]
    below = [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)]
    places = range(len(shown))
    axes.barh(places, values, xerr=[below, above], color="#4c78a8", ecolor="#333333", capsize=3)
    for place, arm, value, extra in zip(places, shown, values, above, strict=True):
        label = f"{value:.2f}x" + (f"   tau {arm['tau']:.2f}" if arm["tau"] else "")
        axes.text(value + extra + 0.03, place, label, va="center", fontsize=9)
    axes.axvline(1.0, color="#999999", linewidth=1, linestyle="--")
    axes.set_yticks(places, [arm["name"] for arm in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max([1.0, *(v + a for v, a in zip(values, above, strict=True))]))
    axes.set_xlabel("decode speed / plain decoding (95 % interval over prompts)")
    axes.set_title("Speed")


def _acceptance(axes: Any, arms: list[dict[str, Any]]) -> None:
    markers = "osD^vP*X"
    drafted = [arm for arm in arms if arm["per_depth"]]
    for arm, marker in zip(drafted, markers * len(drafted), strict=False):
        depths = range(1, len(arm["per_depth"]) + 1)
        axes.plot(depths, arm["per_depth"], marker=marker, markersize=4, label=arm["name"])
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth in the draft")
    axes.set_ylabel("steps that accept at this depth / all steps")
    axes.set_title("Acceptance by depth (the sum is tau - 1)")
    axes.grid(alpha=0.3)
    if drafted:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=9)
