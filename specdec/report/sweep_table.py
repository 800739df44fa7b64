"""The cells of a sweep as one table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.bench.grid import short_names
from specdec.bench.product import in_words
from specdec.report.table import fitting, number, with_interval


def sweep_table(sweep: dict[str, Any], width: int = 140) -> Table:
    """One row an arm of a cell, with as many 95 % intervals over prompts as fit.

    Args:
        sweep: the content of `sweep.json`.
        width: columns of the terminal.
    """
    return fitting(lambda intervals: _table(sweep, intervals), width)


def _table(sweep: dict[str, Any], intervals: tuple[str, ...]) -> Table:
    cells = sweep["cells"]
    table = Table(
        title=f"{len(cells)} cells",
        caption="in brackets: 95 % intervals over prompts" if intervals else None,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = short_names(list(cells[0]["settings"]))
    for name in names.values():
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    table.add_column("arm", overflow="fold")
    for header in ("tau", "tokens\n/s", "vs\nplain", "vs\nHF"):
        table.add_column(header, justify="right", no_wrap=True)
    for cell in cells:
        settings = [_setting(cell["settings"][key]) for key in names]
        # What failed before it measured anything keeps its place in the table.
        for place, arm in enumerate(cell["arms"] or [None]):
            shown = settings if place == 0 else [""] * len(settings)
            table.add_row(*shown, *(_figures(arm, intervals) if arm else ["failed"]))
        table.add_section()
    return table


def _setting(value: Any) -> str:
    return in_words(value).rstrip("/").rpartition("/")[2]


def _figures(arm: dict[str, Any], intervals: tuple[str, ...]) -> list[str]:
    return [
        arm["name"],
        with_interval(arm, "tau", intervals),
        number(arm["decode_tokens_per_s"], 0),
        with_interval(arm, "speedup_vs_plain", intervals),
        with_interval(arm, "speedup_vs_hf", intervals),
    ]
