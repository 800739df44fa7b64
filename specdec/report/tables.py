"""One table model, which the terminal, Markdown and HTML show alike."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import takewhile
from typing import Any

import yaml
from pydantic import Field, field_serializer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from specdec.common.config import Config

_NAME_WIDTH = 32  # text that is longer may go on in the next line


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
        is_optional: left out where no row has a value.
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

    def fit(self, width: int) -> Group:
        """Build the fullest table for a terminal, or several where all figures do not fit in one.

        Intervals give way first, then the columns are split; names stand whole in every part.
        """
        parts = self._parts([column for column in self.columns if not column.is_wide], width)
        figures = (each for part in parts for each in part.columns if each.justify == "right")
        shown = sum(str(cell).endswith("]") for column in figures for cell in column.cells)
        ranked = [column for column in self.columns if column.rank and not column.is_wide]
        known = sum(column.cell(row).endswith("]") for column in ranked for row in self.rows)
        note = ["in brackets: 95 % intervals"] if shown else []
        if shown < known:
            note.append("more 95 % intervals: in a wider terminal, or in the results")
        legend = Text("\n".join([*self.legend, *note]), "table.caption")
        for alarm in self.alarms:
            legend.append(f"\n{alarm}", "bold not dim red")
        whole: list[RenderableType] = [*parts, *([legend] if legend else [])]
        spaced = [line for part in whole for line in (part, "")]
        return Group(Text(self.caption, "table.title"), *spaced)

    def _parts(self, columns: Sequence[Column], width: int) -> list[RichTable]:
        ranks = sorted({column.rank for column in columns if column.rank})
        ranks = [*ranks, max(ranks, default=0) + 1]
        for rank in ranks:
            if table := self._build(columns, rank, width):
                return [table]
        leading = list(takewhile(lambda column: column.digits is None, columns[:2]))
        num_names = max(len(leading), self.num_grouped + 1)
        for end in range(len(columns) - 1, num_names, -1):
            if self._build(columns[:end], ranks[-1], width):
                more = [*columns[:num_names], *columns[end:]]
                return [*self._parts(columns[:end], width), *self._parts(more, width)]
        return [self._build(columns, ranks[-1], 1000) or RichTable()]

    def _build(self, columns: Sequence[Column], min_rank: int, width: int) -> RichTable | None:
        """Build a table with the intervals of columns that have at least this rank, if it fits."""
        rows = [
            [column.cell(row, column.rank >= min_rank) for column in columns] for row in self.rows
        ]
        table = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        room = width - 2 * len(columns) + 2
        wanted, least = [], []
        for column, *cells in zip(columns, *rows, strict=True):
            heads = [column.heading] if column.digits is None else column.title.split("\n")
            wanted.append(max(map(len, [*heads, *cells])))
            least.append(wanted[-1])
            if column.digits is None and wanted[-1] > _NAME_WIDTH:
                longest = max(map(len, " ".join([*heads, *cells]).split()))
                least[-1] = max(_NAME_WIDTH, min(longest, 2 * _NAME_WIDTH))
        if (slack := room - sum(least)) < 0:
            return None
        for column, most, size in zip(columns, wanted, least, strict=True):
            more = min(slack, most - size)
            slack -= more
            if column.digits is None:
                table.add_column(column.heading, overflow="fold", width=size + more)
            else:
                table.add_column(column.title, justify="right", no_wrap=True)
        num = self.num_grouped
        for before, row in zip([[], *rows], rows, strict=False):
            is_same = bool(num) and before[:num] == row[:num]
            if before and num and not is_same:
                table.add_section()
            table.add_row(*map(Text, [""] * num + row[num:] if is_same else row))
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
