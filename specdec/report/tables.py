"""One table model, which the terminal, Markdown and HTML show alike."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field, field_serializer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

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
        return self.title.replace("\n/", "/").replace("\n", " ")

    def cell(self, row: Any, with_interval: bool = True) -> str:
        """Format the value of a row; a dash stands for an unknown one."""
        value = lookup(row, self.key)
        if value is None or self.digits is None:
            return "-" if value is None else str(value)
        low, high = (with_interval and lookup(row, f"{self.key}_ci")) or (0, 0)
        shown = [f"{self.scale * each:.{self.digits}f}" for each in (value, low, high)]
        return f"{shown[0]}{self.unit}" + (f" [{shown[1]}, {shown[2]}]" if low != high else "")


@cache
def words() -> dict[str, Any]:
    """Read the words of reports: introductions, figures, tables, suites, columns and terms."""
    text = files("specdec.report").joinpath("templates/words.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def columns(names: str) -> list[Column]:
    """Give columns by their names in `words.yaml`, which a blank separates."""
    found = {name: {"key": name, **words()["columns"][name]} for name in names.split()}
    return [Column(**each) for each in found.values()]


class Table(Config):
    """Rows of values under columns.

    Attributes:
        id: name in a report, which numbers tables of the same name.
        caption: description of the rows.
        columns: columns in order.
        rows: models or mappings.
        legend: lines below the table in a terminal; a page defines its terms instead.
        num_grouped: number of leading columns that a terminal shows once for rows that share them.
        alarms: lines below the table, in red, without which its figures mislead.
    """

    id: str
    caption: str
    columns: list[Column]
    rows: list[Any]
    legend: list[str] = Field(default=[], exclude=True)
    num_grouped: int = Field(default=0, exclude=True)
    alarms: list[str]

    def __init__(
        self,
        id: str,
        caption: str,
        rows: Iterable[Any],
        more: Sequence[Column] = (),
        legend: Iterable[str] = (),
        num_grouped: int = 0,
        like: str = "",
        alarms: Sequence[str] = (),
    ) -> None:
        """Take columns from `words.yaml`, by `like` or the id, with `more` in place of a *."""
        rows, known = list(rows), words()["tables"].get(like or id, {"columns": "*"})
        shown = [
            column
            for name in known["columns"].split()
            for column in (more if name == "*" else columns(name))
            if not column.is_optional or any(column.cell(row) != "-" for row in rows)
        ]
        given: dict[str, Any] = {"id": id, "caption": caption, "columns": shown, "rows": rows}
        given |= {"legend": [*known.get("legend", ()), *legend], "num_grouped": num_grouped}
        given["alarms"] = list(alarms)
        given["legend"] = [line for line in given["legend"] if line not in alarms]
        super().__init__(**given)

    @field_serializer("columns")
    def _headings(self, columns: list[Column]) -> list[dict[str, str]]:
        return [{"key": column.key, "title": column.heading} for column in columns]

    @field_serializer("rows")
    def _values(self, rows: list[Any]) -> list[dict[str, Any]]:
        """Give the values as they are, not rounded, with the intervals that there are."""
        found = []
        for row in rows:
            values = {column.key: lookup(row, column.key) for column in self.columns}
            ends = {f"{key}_ci": lookup(row, f"{key}_ci") for key in values}
            found.append(values | {key: each for key, each in ends.items() if each is not None})
        return found

    def cells(self) -> list[list[str]]:
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def fit(self, width: int) -> RichTable:
        """Build the fullest table for a terminal; intervals give way first, then columns."""
        full = [column for column in self.columns if not column.is_wide]
        core = [column for column in full if not column.is_optional]
        ranks = sorted({column.rank for column in full if column.rank})
        no_interval = max(ranks, default=0) + 1
        choices = [(full, rank) for rank in ranks or [no_interval] if len(core) < len(full)]
        choices += [(core, rank) for rank in [*ranks, no_interval]]
        measure = Console(width=1000).measure
        built = (self._build(*choice) for choice in choices)
        return next((t for t in built if measure(t).maximum <= width), self._build(*choices[-1]))

    def _build(self, columns: Sequence[Column], min_rank: int) -> RichTable:
        """Build a table with the intervals of columns that have at least this rank."""
        rows = [
            [column.cell(row, column.rank >= min_rank) for column in columns] for row in self.rows
        ]
        ranked = [place for place, column in enumerate(columns) if column.rank >= min_rank]
        has_interval = any(row[place].endswith("]") for row in rows for place in ranked)
        note = ["in brackets: 95 % intervals"] if has_interval else []
        caption = Text("\n".join([*self.legend, *note]), "table.caption")
        for alarm in self.alarms:
            caption.append(f"\n{alarm}", "bold not dim red")
        table = RichTable(
            title=self.caption,
            caption=caption,
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
        num = self.num_grouped
        for before, row in zip([[], *rows], rows, strict=False):
            is_same = bool(num) and before[:num] == row[:num]
            if before and num and not is_same:
                table.add_section()
            table.add_row(*([""] * num + row[num:] if is_same else row))
        return table


def lookup(row: Any, key: str) -> Any:
    """Find a value by its key, dotted where it lies deeper; None where there is none."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part) if isinstance(row, Mapping) else getattr(row, part, None)
    return row


def print_tables(*tables: Table) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table.fit(console.width))
