"""A whole report: its sections in order, before anybody decides how it is written."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from specdec.bench.results import BenchResults, SuiteResults
from specdec.bench.summary import faster_than_tau
from specdec.common.files import locked, replace_file
from specdec.common.provenance import code
from specdec.report.blocks import Context, Figure, Section, Table
from specdec.report.comparable import Difference, check_comparable, comparison, not_alike
from specdec.report.runs import Run, read_runs
from specdec.report.sections.analysis import calibration, evidence, hardest
from specdec.report.sections.bench import (
    acceptance,
    domains,
    results,
    settings,
    shapes,
    speed,
    speedup,
    suite,
    time,
)
from specdec.report.sections.plan import estimate, plan, prediction
from specdec.report.tables import not_trusted

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
        model = {"bench": BenchResults, "suite": SuiteResults}.get(run.kind)
        if model and (
            impossible := faster_than_tau(model.model_validate_json(json.dumps(run.data)))
        ):
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


# Term -> (name, meaning).
DEFINITIONS: dict[str, tuple[str, str]] = {
    "tau": (
        "tau",
        "accepted length, 1 + A / S: accepted draft tokens over verify steps, and the step's own "
        "token; 1 is no speculation",
    ),
    "accepted": (
        "accepted",
        "A / D: accepted over verified draft nodes; in a tree every node counts, so that wide "
        "trees have low shares",
    ),
    "depth": (
        "acceptance at depth i",
        "steps that accepted a token there over all steps; over all depths these sum to tau - 1",
    ),
    "conditional": (
        "conditional acceptance at depth i",
        "steps that accepted a token there over the steps that tested that depth",
    ),
    "alpha": (
        "alpha",
        "mean over positions of the sum over tokens of min(p, q): the chance that one token drawn "
        "from the drafter is kept; measured without sampling, and not A / D",
    ),
    "speed": (
        "tokens/s",
        "tokens after the first chunk over the seconds from first chunk to last, both summed over "
        "prompts, per row; prefill is left out",
    ),
    "speedup": (
        "speed / plain",
        "total seconds of plain decoding in the same loop over the arm's, for the same prompts, "
        "prefill left out; where the texts differ, total tokens over total seconds in both",
    ),
    "whole": ("with prefill / plain", "the same with the seconds of the prefill"),
    "mean_ratio": (
        "mean ratio",
        "mean over prompts of the ratio of decode speeds, which short, easy answers dominate",
    ),
    "hf": ("speed / HF", "the same against the generate method of transformers"),
    "efficiency": (
        "loop efficiency",
        "time in forwards of target and drafter over the wall time of decoding; 1 is a free loop",
    ),
    "interval": ("[low, high]", "95 % bootstrap interval over prompts"),
    "ece": (
        "ECE",
        "expected calibration error: the distance of confidence from acceptance, averaged over "
        "bins by their size",
    ),
    "differ": (
        "differ",
        "prompts whose greedy tokens are not those of a baseline; - when sampling",
    ),
    "p": ("p", "probability that the target gives to a token"),
    "q": ("q", "probability that the drafter gives to it"),
    "overlap": ("overlap", "sum over tokens of min(p, q) at one place; its mean is alpha"),
    "coverage": (
        "coverage",
        "share of places where the token that came is the drafter's first, second, ... guess",
    ),
    "entropy": ("entropy", "of the target's law of the next token at temperature 1, in nats"),
    "temperature": (
        "T",
        "temperature: logits are divided by it before the softmax; 0 is greedy, all probability "
        "on the best token",
    ),
    "top_k": ("top-k", "only the k most probable tokens may be drawn; 0 is off"),
    "top_p": (
        "top-p",
        "only the smallest set of tokens whose probability reaches p may be drawn; 1 is off",
    ),
    "min_p": (
        "min-p",
        "only tokens with at least this share of the best token's probability may be drawn",
    ),
    "rule_token": (
        "rule token",
        "each drafted token is kept with the chance min(1, p / q), the first refused one drawn "
        "again from what p has over q",
    ),
    "rule_block": (
        "rule block",
        "a chain is judged as a whole, which keeps at least as many tokens from the same "
        "distribution",
    ),
    "rule_traversal": (
        "rule traversal",
        "a tree is judged from its leaves upwards, also without changing the distribution",
    ),
    "rule_typical": (
        "rule typical",
        "tokens that the target finds likely enough are kept; this changes the distribution",
    ),
    "estimate": (
        "estimate",
        "computed from stated figures of hardware that was not measured; never a measurement",
    ),
}


def markdown(document: Document) -> str:
    """The text; pictures are files named after their id."""
    parts = [f"# {escape(document.title)}"]
    parts += [f"> **Note:** {escape(warning)}" for warning in document.warnings]
    parts += [_section(section) for section in document.sections]
    lines = [
        f'- <a id="def-{term}"></a>**{escape(name)}**: {escape(meaning)}'
        for term, (name, meaning) in DEFINITIONS.items()
    ]
    parts.append("## Definitions\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no tag, no emphasis, no end of a cell, one line."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`~\[\]#])", r"\\\1", text).replace("\n", " ")


def _section(section: Section) -> str:
    parts = [f"## {escape(section.title)}", *map(escape, section.text)]
    for figure in section.figures:
        parts.append(f"![{escape(figure.alt)}]({figure.id}.png)\n\n{escape(figure.caption)}")
    parts += [_table(table) for table in section.tables]
    parts += [_context(context) for context in section.contexts]
    parts += [escape(reason) for reason in section.missing]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    headings = [
        f"[{escape(c.title)}](#def-{c.term})" if c.term else escape(c.title) for c in table.columns
    ]
    rules = ["---" if column.digits is None else "---:" for column in table.columns]
    rows = [[escape(cell) for cell in row] for row in table.cells()]
    lines = ["| " + " | ".join(row) + " |" for row in (headings, rules, *rows)]
    return f"**{escape(table.caption)}**\n\n" + "\n".join(lines)


def _context(context: Context) -> str:
    drafted = f"<del>{escape(context.rejected)}</del>"
    return (
        f"{escape(context.drafter)}, {escape(context.where)}\n\n"
        f"> {escape(context.before)}{drafted} **{escape(context.target)}**\n\n"
        f"{escape(context.note)}"
    )


def html_page(document: Document) -> str:
    """The page, with its pictures inside."""
    environment = Environment(
        loader=PackageLoader("specdec.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    template = environment.get_template("page.html.jinja")
    return template.render(document=document, definitions=DEFINITIONS)


def _data_uri(figure: Figure) -> str:
    return f"data:image/png;base64,{b64encode(figure.png).decode()}"


SCHEMA = "specdec-report-1"
_PACKAGES = ("specdec", "matplotlib", "jinja2")


def write_report(folders: Sequence[Path], out: Path, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Write `index.html`, `report.md` with PNGs, and `report.json`.

    Args:
        folders: of runs.
        out: made if it is not there.
        allowed: see `check_comparable`.

    Returns:
        The content of `report.json`.

    Raises:
        FileNotFoundError, ValueError: see `read_runs` and `build_document`.
        OSError: the folder cannot be written.
    """
    try:
        document = build_document(read_runs(folders), allowed)
        found = report_json(document)
        page, text = html_page(document), markdown(document)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        names = ", ".join(repr(str(folder)) for folder in folders)
        raise ValueError(
            f"a file of {names} does not hold what a run writes ({type(error).__name__}: {error}); "
            "restore it, or run it again"
        ) from error
    whole = json.dumps(found, indent=1, allow_nan=False) + "\n"
    with locked(out):
        for section in document.sections:
            for figure in section.figures:
                replace_file(out / f"{figure.id}.png", figure.png)
        replace_file(out / "index.html", page.encode())
        replace_file(out / "report.md", text.encode())
        replace_file(out / "report.json", whole.encode())
    return found


def report_json(document: Document) -> dict[str, Any]:
    """Every table with its values as they are, and what is missing."""
    return {
        "schema": SCHEMA,
        "title": document.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": code(_PACKAGES),
        "runs": [
            {"label": run.label, "kind": run.kind, "schema": run.data["schema"]}
            for run in document.runs
        ],
        "warnings": document.warnings,
        "sections": [_section_of_write(section) for section in document.sections],
    }


def _section_of_write(section: Section) -> dict[str, Any]:
    return {
        "id": section.id,
        "title": section.title,
        "text": section.text,
        "tables": [
            {
                "id": table.id,
                "caption": table.caption,
                "columns": [{"key": c.key, "title": c.title} for c in table.columns],
                "rows": [_values(row, [c.key for c in table.columns]) for row in table.rows],
            }
            for table in section.tables
        ],
        "figures": [
            {"id": figure.id, "file": f"{figure.id}.png", "alt": figure.alt}
            for figure in section.figures
        ],
        "contexts": [vars(context) for context in section.contexts],
        "missing": section.missing,
    }


def _values(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """What the table shows, intervals included."""
    wanted = [name for key in keys for name in (key, f"{key}_ci")]
    return {name: row[name] for name in wanted if name in row}
