"""The document that a report is made of, the content of `report.json`, and how it is written."""

import csv
import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from io import StringIO
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, computed_field

from specdec.common.config import Config
from specdec.common.provenance import CodeProvenance
from specdec.report.tables import Table, words


class Figure(Config):
    """A picture; `alt` describes it for readers who cannot see it."""

    id: str
    caption: str
    alt: str
    png: bytes = Field(exclude=True, repr=False)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def file(self) -> str:
        """Name of the PNG beside `report.json`."""
        return f"{self.id}.png"


class Context(Config):
    """A place where the target rejected what was drafted.

    Attributes:
        where: the place in words.
        before: text in front of it.
        rejected: drafted text.
        target: the target's text in its place.
        note: probabilities in words.
    """

    drafter: str
    where: str
    before: str
    rejected: str
    target: str
    note: str


class Section(Config):
    """One part of a report; `missing` holds reasons for what is not here."""

    id: str
    title: str
    text: list[str] = Field(default=[])
    tables: list[Table] = Field(default=[])
    figures: list[Figure] = Field(default=[])
    contexts: list[Context] = Field(default=[])
    missing: list[str] = Field(default=[])

    @property
    def is_empty(self) -> bool:
        return not (self.tables or self.figures or self.contexts)

    def show(self, *tables: Table) -> None:
        for table in tables:
            table.id = _numbered(table.id, self.tables)
            self.tables.append(table)

    def draw(
        self, kind: str, png: bytes, items: Iterable[Any] = (), name: str = "", **values: Any
    ) -> None:
        """Add a picture; the words of its kind say something of each item and hold values."""
        caption, alt, *of_item = words()["figures"][kind]
        values["said"] = "; ".join(text.format(item) for text in of_item for item in items)
        caption, alt = (text.format(**values) for text in (caption, alt))
        name = _numbered(name or kind, self.figures)
        self.figures.append(Figure(id=name, caption=caption, alt=alt, png=png))


class AbsentError(Exception):
    """The reason why a run gives a section nothing to show."""


def _numbered(name: str, present: list[Any]) -> str:
    """Make an id unique: the second table named "arms" is "arms-2"."""
    same = [each for each in present if each.id.rpartition("-")[0] == name]
    return f"{name}-{len(same) + 1}"


class ReportedRun(Config):
    """A file that the report was made of, and the schema of that file."""

    label: str
    kind: Literal[
        "bench", "sweep", "suite", "analysis", "plan", "estimate", "bake-off", "train", "log"
    ]
    schema_: str = Field(alias="schema")


class Report(Config):
    """A report.

    Attributes:
        provenance: command, commit and versions of the report itself, not of its runs.
        warnings: facts that a reader has to know before any figure.
    """

    schema_: Literal["specdec-report-1"] = Field(default="specdec-report-1", alias="schema")
    title: str
    date: str
    provenance: CodeProvenance
    runs: list[ReportedRun]
    warnings: list[str]
    sections: list[Section]


def render(template: str, **values: Any) -> str:
    """Fill in one of the templates of pages and cards; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader("specdec.report"),
        autoescape=lambda name: "html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(base64=lambda content: b64encode(content).decode())
    environment.filters.update(sha256=lambda text: sha256(text.encode()).digest())
    environment.filters.update(md=escape, markdown_table=markdown_table)
    return environment.get_template(f"{template}.jinja").render(**values)


def escape(text: str) -> str:
    """Make text that Markdown shows as it is: no tag, emphasis or end of a cell, one line."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`~\[\]#])", r"\\\1", text).replace("\n", " ")


def markdown_table(table: Table) -> str:
    headings = [
        f"[{escape(column.heading)}](#def-{column.term})" if column.term else escape(column.heading)
        for column in table.columns
    ]
    rules = ["---" if column.digits is None else "---:" for column in table.columns]
    rows = [[escape(cell) for cell in row] for row in table.cells()]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rules, *rows))


def csv_table(table: Table) -> str:
    """Write values as they are, not rounded, with columns of their own for ends of intervals."""
    rows: list[dict[str, Any]] = table.model_dump()["rows"]
    for row in rows:
        for key in [column.key for column in table.columns if f"{column.key}_ci" in row]:
            row[f"{key}_low"], row[f"{key}_high"] = row.pop(f"{key}_ci")
    keys = [f"{column.key}{end}" for column in table.columns for end in ("", "_low", "_high")]
    text = StringIO()
    writer = csv.DictWriter(text, [key for key in keys if any(key in row for row in rows)])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
