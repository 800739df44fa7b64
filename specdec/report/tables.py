"""One table model, which the terminal, Markdown and HTML show alike."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, field_serializer, model_validator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from specdec.common.config import Config


@dataclass(frozen=True)
class Column:
    r"""One column.

    Attributes:
        key: field of the rows, dotted where it lies deeper; an interval is the field `{key}_ci`.
        title: heading; a terminal breaks it at "\n".
        digits: digits behind the point; None for text.
        unit: text behind every number.
        scale: factor between the value and the number shown.
        term: definition that the heading links to.
        rank: order in which a narrow terminal gives up intervals, the lowest first; at 0 a terminal
            shows none.
        is_optional: left out where no row has a value, and where a terminal has no room.
        is_wide: left out of every terminal.
    """

    key: str
    title: str
    digits: int | None = None
    unit: str = ""
    scale: float = 1.0
    term: str = ""
    rank: int = 0
    is_optional: bool = False
    is_wide: bool = False

    @property
    def heading(self) -> str:
        """The title in one line."""
        return self.title.replace("\n/", "/").replace("\n", " ")

    def cell(self, row: Any, with_interval: bool = True) -> str:
        """Format the value of a row; a dash stands for an unknown one."""
        value = lookup(row, self.key)
        if value is None or self.digits is None:
            return "-" if value is None else str(value)
        interval = lookup(row, f"{self.key}_ci") if with_interval else None
        text = self._number(value) + self.unit
        if interval is None or interval[0] == interval[1]:
            return text
        return f"{text} [{self._number(interval[0])}, {self._number(interval[1])}]"

    def _number(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"


class Table(Config):
    """Rows of values under columns.

    Attributes:
        id: name in a report, which numbers tables of the same name.
        caption: description of the rows.
        columns: columns in order.
        rows: models or mappings.
        legend: lines below the table in a terminal; a page defines its terms instead.
        num_grouped: number of leading columns that a terminal shows once for rows that share them.
    """

    id: str
    caption: str
    columns: list[Column]
    rows: list[Any]
    legend: list[str] = Field(default=[], exclude=True)
    num_grouped: int = Field(default=0, exclude=True)

    @model_validator(mode="after")
    def _leave_out_empty_columns(self) -> Self:
        self.columns = [
            column
            for column in self.columns
            if not column.is_optional or any(column.cell(row) != "-" for row in self.rows)
        ]
        return self

    @field_serializer("columns")
    def _headings(self, columns: list[Column]) -> list[dict[str, str]]:
        return [{"key": column.key, "title": column.heading} for column in columns]

    @field_serializer("rows")
    def _values(self, rows: list[Any]) -> list[dict[str, Any]]:
        """Give the values as they are, not rounded, with the intervals that there are."""
        keys = [key for column in self.columns for key in (column.key, f"{column.key}_ci")]
        found = [{key: lookup(row, key) for key in keys} for row in rows]
        return [
            {k: v for k, v in row.items() if v is not None or not k.endswith("_ci")}
            for row in found
        ]

    def cells(self) -> list[list[str]]:
        """Format every cell, [rows][columns]."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def fit(self, width: int) -> RichTable:
        """Build the fullest table for a terminal; intervals give way first, then columns."""
        measure = Console(width=1000).measure
        for columns, min_rank in self._choices():
            table = self._build(columns, min_rank)
            if measure(table).maximum <= width:
                break
        return table

    def _choices(self) -> Iterator[tuple[list[Column], int]]:
        """Columns, and the least rank that keeps its interval, the fullest choice first."""
        full = [column for column in self.columns if not column.is_wide]
        core = [column for column in full if not column.is_optional]
        ranks = sorted({column.rank for column in full if column.rank})
        no_interval = max(ranks, default=0) + 1
        if len(core) < len(full):
            yield from ((full, rank) for rank in ranks or [no_interval])
        yield from ((core, rank) for rank in [*ranks, no_interval])

    def _build(self, columns: Sequence[Column], min_rank: int) -> RichTable:
        shown = [bool(column.rank) and column.rank >= min_rank for column in columns]
        has_interval = any(
            lookup(row, f"{column.key}_ci")
            for column, is_shown in zip(columns, shown, strict=True)
            for row in self.rows
            if is_shown
        )
        note = ["in brackets: 95 % intervals"] if has_interval else []
        table = RichTable(
            title=self.caption,
            caption="\n".join([*self.legend, *note]),
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in columns:
            if column.digits is None:
                table.add_column(column.heading, overflow="fold")
            else:
                table.add_column(column.title, justify="right", no_wrap=True)
        before: list[str] = []
        for row in self.rows:
            cells = [c.cell(row, is_shown) for c, is_shown in zip(columns, shown, strict=True)]
            group = cells[: self.num_grouped]
            if group == before and group:
                cells[: self.num_grouped] = [""] * self.num_grouped
            elif before:
                table.add_section()
            before = group
            table.add_row(*cells)
        return table


def lookup(row: Any, key: str) -> Any:
    """Find a value by its key, dotted where it lies deeper; None where there is none."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part) if isinstance(row, Mapping) else getattr(row, part, None)
    return row


def print_tables(*tables: Table) -> None:
    """Print tables as wide as the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table.fit(console.width))
