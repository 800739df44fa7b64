"""Reliability diagrams: what a drafter thinks of its tokens, and what the target does."""

from collections.abc import Sequence
from typing import Any

from specdec.report.figures.style import GREY, color, label, new_figure, to_png


def reliability(drafters: Sequence[dict[str, Any]]) -> bytes:
    """A panel a drafter: acceptance in each bin of confidence, its size as the marker's area.

    Args:
        drafters: of an analysis, with a `calibration`.
    """
    num_rows = -(-len(drafters) // 2)
    figure = new_figure(0.4 + 2.9 * num_rows)
    panels = figure.subplots(num_rows, 2, squeeze=False, sharex=True, sharey=True).ravel()
    for place, (axes, drafter) in enumerate(zip(panels, drafters, strict=False)):
        bins = [each for each in drafter["calibration"]["bins"] if each["count"]]
        total = sum(each["count"] for each in bins)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        confidence = [each["confidence"] for each in bins]
        acceptance = [each["acceptance"] for each in bins]
        axes.plot(confidence, acceptance, color=color(place), linewidth=1)
        sizes = [12 + 300 * each["count"] / total for each in bins]
        axes.scatter(confidence, acceptance, s=sizes, color=color(place), alpha=0.75)
        ece = drafter["calibration"]["ece"]
        axes.set_title(f"{label(drafter['name'])}\nECE {ece:.3f}", fontsize=10)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
        axes.grid(alpha=0.3)
    for axes in panels[len(drafters) :]:
        axes.set_visible(False)
    figure.supxlabel("confidence of the drafter", fontsize=10)
    figure.supylabel("acceptance by the target", fontsize=10)
    return to_png(figure)
