"""From folders of runs to a report: its sections in order, and its files."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from specdec.bench.summary import faster_than_tau
from specdec.common.files import locked, replace_file
from specdec.common.provenance import CodeProvenance, code
from specdec.report.compare import (
    Difference,
    add_comparison,
    check_comparable,
    warn_of_differences,
)
from specdec.report.document import Report, ReportedRun, Section
from specdec.report.render import html_page, markdown
from specdec.report.runs import Run, read_runs
from specdec.report.sections.analysis import add_analysis, add_calibration, add_hardest
from specdec.report.sections.bench import (
    add_acceptance,
    add_domains,
    add_results,
    add_speed,
    add_speedup,
    add_time,
)
from specdec.report.sections.plan import (
    add_estimate,
    add_plan,
    add_predictions,
    add_shapes,
    not_trusted,
)
from specdec.report.sections.settings import add_settings
from specdec.report.sections.suite import add_suite

# Kind of run -> what gives one, for a report that has none.
_SOURCES = {
    "bench": "No bench among the runs: give the --out folder of specdec bench.",
    "analysis": "No analysis among the runs: give the --out folder of specdec analyze.",
    "plan": "No plan among the runs: give the --out folder of specdec plan.",
    "suite": "No suite among the runs: give the --out folder of specdec bench for a suite.",
    "estimate": "No estimate among the runs: give the --out folder of specdec plan for hardware "
    "that is not here.",
}
_TIME = (
    "Decoding without prefill, milliseconds per emitted token; a batch's time is shared by its "
    "rows. Target and draft are forwards, verify is the processing of logits and the judging, "
    "commit the keeping of what was accepted."
)
_SPEEDUP = (
    "If a step cost what a step of plain decoding costs, and nothing else, the speedup would be "
    "tau. Each part of the step is then added to that cost in the order shown; its factor is the "
    "cost before over the cost after. The last factor is what lies outside of steps: the time "
    "between them, in a batch the wait for other rows, and that the speedup takes each prompt's "
    "median over repeats. Tau times all factors is the measured speedup."
)
_HARDEST = (
    "Places where the distributions of drafter and target overlap least, in the text as it went "
    "on: the drafter's likeliest token, which the target rejects, is struck out, and the text that "
    "came instead is bold and underlined twice. At most five of each drafter."
)


def write_report(folders: Sequence[Path], out: Path, allowed: Sequence[str] = ()) -> Report:
    """Write `index.html`, `report.md` with PNGs, and `report.json`."""
    report = build_report(read_runs(folders), allowed)
    page, text = html_page(report), markdown(report)
    with locked(out):
        for section in report.sections:
            for figure in section.figures:
                replace_file(out / figure.file, figure.png)
        replace_file(out / "index.html", page.encode())
        replace_file(out / "report.md", text.encode())
        replace_file(out / "report.json", report.model_dump_json(by_alias=True, indent=1).encode())
    return report


def build_report(runs: Sequence[Run], allowed: Sequence[str] = ()) -> Report:
    """Make every section; benches that differ in fields `allowed` are compared all the same."""
    for run in runs:  # a sweep's cells have said so themselves
        if run.kind in ("bench", "suite") and (impossible := faster_than_tau(run.data)):
            raise ValueError(f"{run.label}: {'; '.join(impossible)}")
    benches = [run for run in runs if run.kind == "bench"]
    differences = check_comparable(benches, allowed)
    made = _sections(runs)
    sections = [section for section in made if not section.is_empty]
    if len(benches) > 1:
        comparison = Section(id="comparison", title="Comparison of runs")
        add_comparison(comparison, benches)
        sections.insert(0, comparison)
    absent = [f"{each.title}: {' '.join(each.missing)}" for each in made if each.is_empty]
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
        warnings=_warnings(runs, differences),
        sections=sections,
    )


# Id, title, kinds of run that give one (all runs where none is named), builder, introduction.
_SECTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[..., None], str], ...] = (
    ("results", "Results", ("bench", "sweep"), add_results, ""),
    ("domains", "By task", ("bench",), add_domains, ""),
    ("speed", "Speed against tau", ("bench",), add_speed, ""),
    ("acceptance", "Acceptance by depth", ("bench",), add_acceptance, ""),
    ("shapes", "Draft shape against speed", (), add_shapes, ""),
    ("analysis", "Analysis without sampling noise", ("analysis",), add_analysis, ""),
    ("calibration", "Calibration", ("analysis",), add_calibration, ""),
    ("time", "Where the time went", ("bench",), add_time, _TIME),
    ("speedup", "Where the speedup went", ("bench",), add_speedup, _SPEEDUP),
    ("plan", "Plan", ("plan",), add_plan, ""),
    ("prediction", "Prediction against measurement", (), add_predictions, ""),
    ("hardest", "Hardest contexts", ("analysis",), add_hardest, _HARDEST),
    ("suite", "Suites", ("suite",), add_suite, ""),
    ("estimate", "Estimate for other hardware", ("estimate",), add_estimate, ""),
    ("runs", "Runs and settings", (), add_settings, ""),
)


def _sections(runs: Sequence[Run]) -> list[Section]:
    """Make the sections in the order of the page."""
    sections = []
    for name, title, kinds, add, text in _SECTIONS:
        section = Section(id=name, title=title, text=[text] if text else [])
        if not kinds:
            add(section, runs)
        for run in runs:
            if run.kind in kinds:
                add(section, run)
        if kinds and not any(run.kind in kinds for run in runs):
            section.missing.append(_SOURCES[kinds[0]])
        sections.append(section)
    return sections


def _warnings(runs: Sequence[Run], differences: dict[str, list[Difference]]) -> list[str]:
    first = next((run.label for run in runs if run.kind == "bench"), "")
    found = [
        f"{first} and {label} differ in {each.key}: {each.first} and "
        f"{each.other}. They are compared because --allow {each.field} was given; their figures "
        "are not of the same thing."
        for label, allowed in differences.items()
        for each in allowed
    ]
    for run in runs:
        if run.kind == "bench":
            found += [
                f"{run.label}: outputs of {arm.name} differ from plain decoding on "
                f"{arm.mismatches} prompts."
                for arm in run.data.arms
                if arm.mismatches
            ]
        elif run.kind == "plan":
            found += [f"{run.label}: {said}" for said in not_trusted(run.data)]
    found += warn_of_differences(runs)
    if any(run.kind == "estimate" for run in runs):
        found.append("Figures of an estimate are computed from stated hardware, not measured.")
    return found
