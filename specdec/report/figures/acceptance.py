"""Acceptance by depth: of all steps, and of the steps that came so far."""

from collections.abc import Sequence
from typing import Any

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


def acceptance_by_depth(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """Two panels, one above the other.

    Args:
        curves: (name, unconditional, conditional), each by depth; the unconditional may be empty.
    """
    panels = [(1, "accepted at this depth / all steps"), (2, "accepted / steps that tested it")]
    panels = [panel for panel in panels if any(curve[panel[0]] for curve in curves)]
    figure = new_figure(0.6 + 2.9 * len(panels) + 0.13 * len(curves))
    for axes, (which, title) in zip(_listed(figure.subplots(len(panels), 1)), panels, strict=True):
        for place, curve in enumerate(curves):
            values = curve[which]
            axes.plot(
                range(1, len(values) + 1),
                values,
                marker=marker(place),
                markersize=5,
                color=color(place),
                linestyle=line(place // 2),
                # Curves that coincide stay visible: the later ones are thinner.
                linewidth=2.6 - 1.6 * place / max(1, len(curves) - 1),
                label=label(curve[0], 34),
            )
        axes.set(ylim=(0, 1.02), xlabel="depth in the draft", ylabel="share")
        axes.set_title(title, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)


def _listed(found: Any) -> list[Any]:
    return list(found) if hasattr(found, "__len__") else [found]


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


def expected_tau(drafters: Sequence[dict[str, Any]]) -> bytes:
    """Tau against drafted tokens a step: a line of chains and one of trees a drafter.

    Args:
        drafters: of an analysis, with `expected`.
    """
    figure = new_figure(4.0 + 0.13 * len(drafters))
    axes = figure.subplots()
    for place, drafter in enumerate(drafters):
        for key, style, fill in (("chains", "-", None), ("trees", "--", "white")):
            drafts = sorted(drafter["expected"][key], key=lambda each: each["nodes_per_step"])
            axes.plot(
                [each["nodes_per_step"] for each in drafts],
                [each["tau"] for each in drafts],
                marker=marker(place),
                markersize=5,
                markerfacecolor=fill,
                color=color(place),
                linestyle=style,
                label=label(f"{drafter['name']}, {key}", 34) if drafts else "_",
            )
    axes.set(xlabel="drafted tokens a step", ylabel="expected tau")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return to_png(figure)
