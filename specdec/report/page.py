"""From folders of runs to a report: its sections in order, and its files."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.bench.summary import faster_than_tau
from specdec.common.files import locked, replace_file
from specdec.common.provenance import CodeProvenance, code
from specdec.report import analysis, bench, compare, plan
from specdec.report.document import AbsentError, Report, ReportedRun, Section, render
from specdec.report.runs import Run, read_log, read_runs
from specdec.report.tables import words

# Id, title, kinds of run that give one (all runs where none is named), and what fills it.
_SECTIONS: list[tuple[str, str, tuple[str, ...], Callable[[Section, Any], None]]] = [
    ("results", "Results", ("bench", "sweep", "bake-off"), bench.add_results),
    ("log", "Over time", ("log",), bench.add_log),
    ("domains", "By task", ("bench",), bench.add_domains),
    ("speed", "Speed against tau", ("bench", "bake-off"), bench.add_speed),
    ("acceptance", "Acceptance by depth", ("bench", "bake-off"), bench.add_acceptance),
    ("shapes", "Draft shape against speed", (), plan.add_shapes),
    ("analysis", "Analysis without sampling noise", ("analysis",), analysis.add_analysis),
    ("calibration", "Calibration", ("analysis",), analysis.add_calibration),
    ("time", "Where the time went", ("bench",), bench.add_time),
    ("speedup", "Where the speedup went", ("bench",), bench.add_speedup),
    ("plan", "Plan", ("plan",), plan.add_plan),
    ("prediction", "Prediction against measurement", (), plan.add_predictions),
    ("hardest", "Hardest contexts", ("analysis",), analysis.add_hardest),
    ("suite", "Suites", ("suite",), bench.add_suite),
    ("estimate", "Estimate for other hardware", ("estimate",), plan.add_estimate),
    ("runs", "Runs and settings", (), compare.add_settings),
]


def write_report(
    folders: Sequence[Path], out: Path, allowed: Sequence[str] = (), logs: Sequence[Path] = ()
) -> Report:
    runs = read_runs(folders) if folders else []
    report = build_report([*runs, *map(read_log, logs)], allowed)
    texts = {
        name: render(name, report=report, definitions=words()["terms"])
        for name in ("index.html", "report.md")
    }
    texts["report.json"] = report.model_dump_json(by_alias=True, indent=1)
    with locked(out):
        for section in report.sections:
            for figure in section.figures:
                replace_file(out / figure.file, figure.png)
        for name, text in texts.items():
            replace_file(out / name, text.encode())
    return report


def build_report(runs: Sequence[Run], allowed: Sequence[str] = ()) -> Report:
    """Make every section; benches that differ in fields `allowed` are compared all the same."""
    for run in runs:  # a sweep's cells have said so themselves
        if run.kind in ("bench", "suite") and (impossible := faster_than_tau(run.data)):
            raise ValueError(f"{run.label}: {'; '.join(impossible)}")
    benches = [run for run in runs if run.kind == "bench"]
    warnings = compare.check_comparable(benches, allowed)
    made = [_section(runs, *each) for each in _SECTIONS]
    sections = [section for section in made if not section.is_empty]
    if len(benches) > 1:
        comparison = Section(id="comparison", title="Comparison of runs")
        compare.add_comparison(comparison, benches)
        sections.insert(0, comparison)
    absent = [
        f"{each.title}: {' '.join(each.missing)}" for each in made if each.missing and each.is_empty
    ]
    if absent:
        title = "What is not in this report"
        sections.append(Section(id="absent", title=title, missing=absent))
    return Report(
        title=f"Speculative decoding: {', '.join(dict.fromkeys(run.label for run in runs))}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=CodeProvenance(**code(("specdec", "matplotlib", "jinja2"))),
        runs=[
            ReportedRun.model_validate({"label": r.label, "kind": r.kind, "schema": r.data.schema_})
            for r in runs
        ],
        warnings=[*warnings, *_warnings(runs)],
        sections=sections,
    )


def _section(
    runs: Sequence[Run], name: str, title: str, kinds: tuple[str, ...], add: Callable[..., Any]
) -> Section:
    section = Section(id=name, title=title, text=words()["introductions"].get(name, []))
    given = [run for run in runs if run.kind in kinds] if kinds else [runs]
    for each in given:
        try:
            add(section, each)
        except AbsentError as reason:
            section.missing.append(str(reason))
    if not given and kinds[0] in words()["absent"]:
        section.missing.append(words()["absent"][kinds[0]])
    return section


def _warnings(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        notes = getattr(run.data.provenance, "notes", [])  # of measurements alone
        found += [f"{run.label}: {note}." for note in notes]
        if run.kind == "bench":
            found += [
                f"{run.label}: outputs of {arm.name} differ from plain decoding on "
                f"{arm.mismatches} prompts."
                for arm in run.data.arms
                if arm.mismatches
            ]
        elif run.kind == "plan":
            found += [f"{run.label}: {said}" for said in plan.not_trusted(run.data)]
    found += compare.warn_of_differences(runs)
    if any(run.kind == "estimate" for run in runs):
        found.append("Figures of an estimate are computed from stated hardware, not measured.")
    return found
