"""Writing a report: a page, Markdown with pictures, and the data of both for machines."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.files import locked, replace_file
from specdec.provenance import code
from specdec.report.blocks import Section
from specdec.report.document import Document, build_document
from specdec.report.markdown import markdown
from specdec.report.page import html_page
from specdec.report.runs import read_runs

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
        "sections": [_section(section) for section in document.sections],
    }


def _section(section: Section) -> dict[str, Any]:
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
