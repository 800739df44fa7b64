"""The performance log over time and versions."""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from specdec.bench.log import LogEntry
from specdec.bench.results import Results
from specdec.common.files import parse_line
from specdec.common.provenance import CodeProvenance, code
from specdec.report import figures
from specdec.report.document import Section
from specdec.report.runs import Run
from specdec.report.tables import Table


class Log(Results):
    """Lines of a log, as they were read now."""

    schema_: Literal["specdec-log-1"] = Field(default="specdec-log-1", alias="schema")
    provenance: CodeProvenance
    entries: list[LogEntry]


def read_log(path: Path) -> Run:
    """Read the lines that are whole; a `ValueError` if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}; specdec bench writes one, see SPECDEC_LOG")
    with path.open("rb") as file:
        rows = [LogEntry.model_validate(row) for row in map(parse_line, file) if row]
    if not rows:
        raise ValueError(f"the log {str(path)!r} holds no line of a bench")
    return Run(
        "log", path.name, path.parent, Log(provenance=CodeProvenance(**code()), entries=rows)
    )


def add_log(section: Section, run: Run) -> None:
    """Draw each setting's arms over time, and list them."""
    settings: dict[str, list[LogEntry]] = {}
    for entry in sorted(run.data.entries, key=lambda entry: datetime.fromisoformat(entry.date)):
        settings.setdefault(entry.setting, []).append(entry)
    said = [entries[-1] for entries in settings.values()]
    section.draw("log", figures.over_time(list(settings.values())), said, label=run.label)
    rows = [
        {**vars(entry), **vars(arm), "version": entry.version}
        for entries in settings.values()
        for entry in entries
        for arm in entry.arms
    ]
    section.show(Table("log", f"{run.label}: every bench, by setting", rows))
