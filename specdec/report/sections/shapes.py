"""Draft shape against speed."""

from collections.abc import Sequence

from specdec.report.blocks import Figure, Section
from specdec.report.figures.shape import chain_lines, tree_heat_map
from specdec.report.runs import Run
from specdec.report.sections.bench import measured
from specdec.report.shapes import Point, by_group, is_map, points, vertical


def shapes(runs: Sequence[Run]) -> Section:
    """A heat map of every strategy's trees and a line of its chains, measured and predicted."""
    section = Section("shapes", "Draft shape against speed")
    for run in measured(runs):
        _draw(section, points(run.arms, "speedup_vs_plain"), run.label, "measured")
    for plan in (run for run in runs if run.kind == "plan"):
        configurations = plan.data["configurations"]
        for size in sorted({each["batch_size"] for each in configurations}):
            here = [each for each in configurations if each["batch_size"] == size]
            label = f"{plan.label}, batch {size}"
            _draw(section, points(here, "predicted_speedup"), label, "predicted")
    if not section.figures:
        section.missing.append(
            "No strategy in two shapes: give a sweep over its options, or the folder of specdec "
            "plan."
        )
    return section


def _draw(section: Section, found: Sequence[Point], label: str, origin: str) -> None:
    trees = by_group(point for point in found if not point.is_chain)
    chains = by_group(point for point in found if point.is_chain)
    for members in filter(is_map, trees.values()):
        section.figures.append(_heat_map(members, label, origin, len(section.figures) + 1))
    if chains:
        groups = list(chains.values())
        section.figures.append(_chains(groups, label, origin, len(section.figures) + 1))


def _heat_map(members: Sequence[Point], label: str, origin: str, place: int) -> Figure:
    best = max(members, key=lambda point: point.speedup)
    other = {"nodes": "node budget", "width": "width"}[vertical(members)]
    return Figure(
        f"shape-{place}",
        f"{label}: {origin} speed over plain decoding of {members[0].label}, trees by depth and "
        f"{other}; the fastest is framed. Shapes that share a cell show the faster one.",
        f"Heat map of {len(members)} trees of {members[0].label}. The fastest, {best.name}, "
        f"reaches {best.speedup:.2f}x with depth {best.depth}, width {best.width} and "
        f"{best.nodes} nodes.",
        tree_heat_map(members),
    )


def _chains(groups: Sequence[Sequence[Point]], label: str, origin: str, place: int) -> Figure:
    best = [max(members, key=lambda point: point.speedup) for members in groups]
    said = "; ".join(f"{b.label} best at {b.length}: {b.speedup:.2f}x" for b in best)
    return Figure(
        f"shape-{place}",
        f"{label}: {origin} speed over plain decoding by the length of a chain, or by the node "
        "budget of a strategy that has no depth.",
        f"Lines of speed against draft length. {said}.",
        chain_lines(groups),
    )
