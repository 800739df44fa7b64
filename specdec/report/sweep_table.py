"""The cells of a sweep as one table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.bench.grid import short_names
from specdec.bench.product import in_words
from specdec.report.table import first_that_fits, interval_choices, number, with_interval


def sweep_table(sweep: dict[str, Any], width: int = 140) -> Table:
    """One row an arm of a cell, with as much of this as fits: domains, and 95 % intervals.

    Args:
        sweep: the content of `sweep.json`.
        width: columns of the terminal.
    """
    choices = [
        (intervals, domains)
        for domains in _domains(sweep)
        for intervals in interval_choices()
        # Without a single interval, domains would say more than was measured.
        if intervals or not domains
    ]
    return first_that_fits((_table(sweep, *choice) for choice in choices), width)


def _domains(sweep: dict[str, Any]) -> list[list[str]]:
    """The domains of all cells, then none; of a single one there is nothing more to say."""
    arms = [arm for cell in sweep["cells"] for arm in cell["arms"]]
    names = list(dict.fromkeys(name for arm in arms for name in arm["domains"]))
    several = any(len(arm["domains"]) > 1 for arm in arms)
    return [names, []] if several else [[]]


def _table(sweep: dict[str, Any], intervals: tuple[str, ...], domains: list[str]) -> Table:
    cells = sweep["cells"]
    table = Table(
        title=f"{len(cells)} cells",
        caption=_caption(intervals, domains),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = short_names(list(cells[0]["settings"]))
    for name in names.values():
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    table.add_column("arm", overflow="fold")
    for header in ("tau", "tokens\n/s", "vs\nplain", "vs\nHF", *domains):
        table.add_column(header, justify="right", no_wrap=True)
    for cell in cells:
        settings = [_setting(cell["settings"][key]) for key in names]
        # What failed before it measured anything keeps its place in the table.
        for place, arm in enumerate(cell["arms"] or [None]):
            shown = settings if place == 0 else [""] * len(settings)
            figures = _figures(arm, intervals, domains) if arm else ["failed"]
            table.add_row(*shown, *figures)
        table.add_section()
    return table


def _caption(intervals: tuple[str, ...], domains: list[str]) -> str | None:
    lines = ["in brackets: 95 % intervals over prompts"] if intervals else []
    if domains:
        lines.append("by domain: tau and speed / plain decoding")
    return "\n".join(lines) or None


def _setting(value: Any) -> str:
    return in_words(value).rstrip("/").rpartition("/")[2]


def _figures(arm: dict[str, Any], intervals: tuple[str, ...], domains: list[str]) -> list[str]:
    return [
        arm["name"],
        with_interval(arm, "tau", intervals),
        number(arm["decode_tokens_per_s"], 0),
        with_interval(arm, "speedup_vs_plain", intervals),
        with_interval(arm, "speedup_vs_hf", intervals),
        *(_of_domain(arm["domains"].get(domain)) for domain in domains),
    ]


def _of_domain(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{number(figures['tau'], 2)}  {number(figures['speedup_vs_plain'], 2)}"
