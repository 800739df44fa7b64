"""The results of a bench as a table."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from specdec.report.title import results_title

# Columns that have an interval, the one to give up first at the end.
_INTERVALS = ("speedup_vs_plain", "tau", "speedup_vs_hf")


def results_table(results: dict[str, Any], width: int = 140) -> Table:
    """One row an arm, with as many 95 % intervals over prompts as fit.

    Args:
        results: the content of `results.json`.
        width: columns of the terminal.
    """
    return fitting(lambda intervals: _table(results, intervals), width)


def fitting(build: Callable[[tuple[str, ...]], Table], width: int) -> Table:
    """The table with as many intervals as fit.

    Args:
        build: makes it, given the columns that show one.
        width: columns of the terminal.
    """
    return first_that_fits((build(intervals) for intervals in interval_choices()), width)


def interval_choices() -> list[tuple[str, ...]]:
    """Which columns show their interval: all that have one, then fewer and fewer."""
    return [_INTERVALS[:count] for count in range(len(_INTERVALS), -1, -1)]


def first_that_fits(tables: Iterable[Table], width: int) -> Table:
    """The first table that fits, or the last one.

    Args:
        tables: the one that shows most first.
        width: columns of the terminal.
    """
    console = Console(width=1000)
    for table in tables:
        if console.measure(table).maximum <= width:
            break
    return table


def _table(results: dict[str, Any], intervals: tuple[str, ...]) -> Table:
    table = Table(
        title=results_title(results),
        caption=_caption(results, bool(intervals)),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # Where a terminal is too narrow for everything, an arm's name goes on in the next line.
    table.add_column("arm", overflow="fold")
    headers = ("tau", "acc.", "tokens\n/s", "vs\nplain", "vs\nHF", "e2e", "loop\neff.", "differ")
    for header in (*headers, "failed"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in results["arms"]:
        table.add_row(
            arm["name"],
            with_interval(arm, "tau", intervals),
            "-" if not arm["acceptance_rate"] else f"{arm['acceptance_rate']:.0%}",
            number(arm["decode_tokens_per_s"], 0),
            with_interval(arm, "speedup_vs_plain", intervals),
            with_interval(arm, "speedup_vs_hf", intervals),
            number(arm["end_to_end_speedup_vs_plain"], 2),
            number(arm["loop_efficiency"], 3),
            "-" if arm["mismatches"] is None else str(arm["mismatches"]),
            str(arm["failed"]),
        )
    return table


def _caption(results: dict[str, Any], has_intervals: bool) -> str:
    lines = [
        "acc.: accepted / drafted; speeds: of total times; e2e: with prefill",
        "HF: transformers' generate; differ: prompts whose greedy tokens differ",
    ]
    if has_intervals:
        lines.append("in brackets: 95 % intervals over prompts")
    differences = [each for arm in results["arms"] for each in arm["differences"]]
    gaps = [each["top2_gap"] for each in differences if each["top2_gap"] is not None]
    if gaps:
        lines.append(f"the two best logits where outputs part are at most {max(gaps):.2g} apart")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    """A figure in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(arm: dict[str, Any], key: str, intervals: tuple[str, ...]) -> str:
    """An arm's figure, with its interval where that is among those to show."""
    value, interval = arm[key], arm[f"{key}_ci"]
    if value is None or interval is None or key not in intervals:
        return number(value, 2)
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
