"""The document that a report is made of, and the content of `report.json`."""

from typing import Any, Literal

from pydantic import Field, computed_field

from specdec.common.config import Config
from specdec.common.provenance import CodeProvenance
from specdec.report.tables import Column, Table


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
        """True without anything to show."""
        return not (self.tables or self.figures or self.contexts)

    def show(self, *tables: Table) -> None:
        """Add tables."""
        for table in tables:
            table.id = _numbered(table.id, self.tables)
            self.tables.append(table)

    def tabulate(self, name: str, caption: str, columns: list[Column], rows: list[Any]) -> None:
        """Add a table."""
        self.show(Table(id=name, caption=caption, columns=columns, rows=rows))

    def draw(self, name: str, caption: str, alt: str, png: bytes) -> None:
        """Add a figure."""
        name = _numbered(name, self.figures)
        self.figures.append(Figure(id=name, caption=caption, alt=alt, png=png))


def _numbered(name: str, present: list[Any]) -> str:
    """Make an id unique: the second table named "arms" is "arms-2"."""
    same = [each for each in present if each.id.rpartition("-")[0] == name]
    return f"{name}-{len(same) + 1}"


class ReportedRun(Config):
    """A file that the report was made of, and the schema of that file."""

    label: str
    kind: Literal["bench", "sweep", "suite", "analysis", "plan", "estimate"]
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
