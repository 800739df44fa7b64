"""What a report is made of, whatever it is written as: sections, tables, pictures, contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows; an interval stands beside it in the row, under `key` and "_ci".
        title: its heading.
        digits: behind the point; None for text.
        unit: stands behind every figure, with its own space where it wants one.
        term: of `DEFINITIONS`, which the heading links to.
    """

    key: str
    title: str
    digits: int | None = None
    unit: str = ""
    term: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values, which are put into words here and nowhere else.

    Attributes:
        id: unique in the report.
        caption: what the rows are.
        columns: in order.
        rows: values by key; None for what is not known.
    """

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    def cells(self) -> list[list[str]]:
        """The text of every cell, [rows][columns]."""
        return [[_cell(row, column) for column in self.columns] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """One picture.

    Attributes:
        id: unique in the report; also the name of its file.
        caption: how it is read.
        alt: what it shows, for those who cannot see it.
        png: its bytes.
    """

    id: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Context:
    """A place where the target refused what was drafted.

    Attributes:
        drafter: that drafted.
        where: the place in words.
        before: text in front of it.
        rejected: drafted text that was refused.
        target: what the target says instead.
        note: probabilities in words.
    """

    drafter: str
    where: str
    before: str
    rejected: str
    target: str
    note: str


@dataclass
class Section:
    """One part of the report.

    Attributes:
        id: unique in the report.
        title: its heading.
        text: paragraphs above everything else.
        tables: of this section.
        figures: of this section.
        contexts: of this section.
        missing: what is not here, and why.
    """

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it to show."""
        return not (self.tables or self.figures or self.contexts)


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure in words; "-" for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    if value is None:
        return "-"
    if column.digits is None:
        return str(value)
    interval = row.get(f"{column.key}_ci")
    text = number(value, column.digits, column.unit)
    if interval is None:
        return text
    low, high = (number(bound, column.digits) for bound in interval)
    return f"{text} [{low}, {high}]"
