"""A whole report: its sections in order, before anybody decides how it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.bench.speed import faster_than_tau
from specdec.report.blocks import Section
from specdec.report.comparable import Difference, check_comparable, not_alike
from specdec.report.compare import comparison
from specdec.report.plan_table import not_trusted
from specdec.report.runs import Run
from specdec.report.sections.analysis import calibration, evidence, hardest
from specdec.report.sections.bench import acceptance, domains, results, speed
from specdec.report.sections.estimate import estimate
from specdec.report.sections.plan import plan
from specdec.report.sections.prediction import prediction
from specdec.report.sections.settings import settings
from specdec.report.sections.shapes import shapes
from specdec.report.sections.suite import suite
from specdec.report.sections.time import speedup, time

# In the order of the page.
_SECTIONS = (
    results,
    domains,
    speed,
    acceptance,
    shapes,
    evidence,
    calibration,
    time,
    speedup,
    plan,
    prediction,
    hardest,
    suite,
    estimate,
    settings,
)


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the whole.
        runs: what it was made of.
        warnings: what a reader has to know before any figure.
        sections: in order.
    """

    title: str
    runs: Sequence[Run]
    warnings: list[str]
    sections: list[Section]


def build_document(runs: Sequence[Run], allowed: Sequence[str] = ()) -> Document:
    """Make every section.

    Args:
        runs: of `read_runs`.
        allowed: fields in which benches may differ and be compared all the same.

    Raises:
        ValueError: benches that are not comparable, an arm that is faster than its tau, or
            matplotlib is not installed.
    """
    for run in runs:  # a sweep's cells have said so themselves
        if run.kind in ("bench", "suite") and (impossible := faster_than_tau(run.data)):
            raise ValueError(f"{run.label}: {'; '.join(impossible)}")
    benches = [run for run in runs if run.kind == "bench"]
    differ = check_comparable(benches, allowed)
    made = [make(runs) for make in _SECTIONS]
    sections = [section for section in made if not section.is_empty]
    if len(benches) > 1:
        sections.insert(0, comparison(benches, differ))
    absent = [section for section in made if section.is_empty]
    if absent:
        sections.append(_absent(absent))
    title = f"Speculative decoding: {', '.join(dict.fromkeys(run.label for run in runs))}"
    return Document(title, runs, _warnings(benches, differ, runs), sections)


def _absent(sections: Sequence[Section]) -> Section:
    """What a report could hold and this one does not, and why."""
    said = [f"{section.title}: {' '.join(section.missing)}" for section in sections]
    return Section("absent", "What is not in this report", missing=said)


def _warnings(
    benches: Sequence[Run], differ: dict[str, list[Difference]], runs: Sequence[Run]
) -> list[str]:
    found = [
        f"{benches[0].label} and {label} differ in {each.key}: {each.values[0]} and "
        f"{each.values[1]}. They are compared because --allow {each.field} was given; their "
        "figures are not of the same thing."
        for label, differences in differ.items()
        for each in differences
    ]
    found += [
        f"{run.label}: outputs of {arm['name']} differ from plain decoding on {arm['mismatches']} "
        "prompts."
        for run in benches
        for arm in run.arms
        if arm["mismatches"]
    ]
    found += [
        f"{run.label}: {said}"
        for run in runs
        if run.kind == "plan"
        for said in not_trusted(run.data)
    ]
    found += not_alike(runs)
    if any(run.kind == "estimate" for run in runs):
        found.append("Figures of an estimate are computed from stated hardware, not measured.")
    return found
