"""From folders of runs to a report: its sections in order, and its files."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.common.files import locked, replace_file
from specdec.common.provenance import CodeProvenance, code
from specdec.report import analysis, bench, compare, plan
from specdec.report.document import AbsentError, Report, ReportedRun, Section, csv_table, render
from specdec.report.runs import Run, read_log, read_runs
from specdec.report.tables import words

# Id, title, kinds of run that give one (all runs where none is named), and what fills it.
_SECTIONS: list[tuple[str, str, tuple[str, ...], Callable[[Section, Any], None]]] = [
    ("summary", "Summary", (), bench.add_summary),
    ("log", "Runs over time", (), bench.add_log),
    ("results", "Results", ("bench", "sweep", "bake-off"), bench.add_results),
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
    ("training", "Training", (), analysis.add_training),
    ("hardest", "Hardest contexts", ("analysis",), analysis.add_hardest),
    ("suite", "Suites", ("suite",), bench.add_suite),
    ("estimate", "Estimate for other hardware", ("estimate",), plan.add_estimate),
    ("runs", "Runs and settings", (), compare.add_settings),
]


def write_report(
    folders: Sequence[Path], out: Path, allowed: Sequence[str] = (), logs: Sequence[Path] = ()
) -> Report:
    runs, unread = read_runs(folders) if folders else ([], [])
    report = build_report([*runs, *map(read_log, logs)], allowed, unread)
    texts = {
        name: render(name, report=report, definitions=words()["terms"])
        for name in ("index.html", "report.md")
    }
    texts["report.json"] = report.model_dump_json(by_alias=True, indent=1)
    with locked(out):
        (out / "csv").mkdir(exist_ok=True)
        for section in report.sections:
            for figure in section.figures:
                replace_file(out / figure.file, figure.png)
            for table in section.tables:
                replace_file(out / "csv" / f"{table.id}.csv", csv_table(table).encode())
        for name, text in texts.items():
            replace_file(out / name, text.encode())
    return report


def build_report(
    given: Sequence[Run], allowed: Sequence[str] = (), unread: Sequence[str] = ()
) -> Report:
    """Make every section; benches that differ in fields `allowed` are compared all the same.

    Found ones that differ are not compared; of one configuration the newest is shown whole.
    """
    runs, absent = _newest(given), list(unread)
    if older := sorted({run.label for run in given} - {run.label for run in runs}):
        why = "only in Runs over time, for a newer run has the same configuration"
        absent.append(f"{', '.join(older)}: {why}. Give their folders by name to see them whole.")
    benches = [run for run in runs if run.kind == "bench"]
    warnings = compare.check_comparable([run for run in benches if not run.is_found], allowed)
    made = [_section(given if each[0] == "log" else runs, *each) for each in _SECTIONS]
    comparison = Section(id="comparison", title="Comparison of runs")
    for group in compare.comparable_groups(benches, allowed):
        compare.add_comparison(comparison, group)
    made.insert(1, comparison)
    sections = [section for section in made if not section.is_empty]
    absent[:0] = [
        f"{each.title}: {' '.join(each.missing)}" for each in made if each.missing and each.is_empty
    ]
    if absent:
        title = "What is not in this report"
        sections.append(Section(id="absent", title=title, missing=absent))
    labels = list(dict.fromkeys(run.label for run in given))
    if len(labels) > 4:
        labels = [f"{len(labels)} runs"]
    return Report(
        title=f"Speculative decoding: {', '.join(labels)}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=CodeProvenance(**code(("specdec", "matplotlib", "jinja2"))),
        runs=[
            ReportedRun.model_validate({"label": r.label, "kind": r.kind, "schema": r.data.schema_})
            for r in given
        ],
        warnings=[*warnings, *_warnings(runs)],
        sections=sections,
    )


def _newest(runs: Sequence[Run]) -> list[Run]:
    """Leave out found runs of which a newer one has the same configuration and machine."""
    newest: dict[Any, int] = {}
    for run in sorted(runs, key=lambda run: run.data.provenance.date):
        same = map(run.provenance.get, ("config_fingerprint", "device", "cpu", "threads"))
        newest[(run.kind, *same) if run.is_found and run.kind in bench.LOGGED else id(run)] = id(
            run
        )
    return [run for run in runs if id(run) in newest.values()]


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
