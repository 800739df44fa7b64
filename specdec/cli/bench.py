"""`specdec bench`."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers

if TYPE_CHECKING:
    from specdec.bench.grid import Cell
    from specdec.bench.processes import Processes

Progress = Callable[[int, int, str], None]


@app.command()
@exit_statuses()
def bench(
    config: Annotated[
        str,
        typer.Argument(
            help="a YAML file of one bench, or of many with a grid: or a suite: in it; 'demo' for "
            "the packaged one"
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value ..., as in repeats=1 or grid.batch_size=[1,4]"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="folder for records and results; the same command resumes there")
    ] = Path("runs/bench"),
    only_list: Annotated[
        bool, typer.Option("--list", help="show the cells and their arms, and run nothing")
    ] = False,
) -> None:
    """Measure draft strategies against plain decoding and transformers' generate.

    With torchrun or accelerate launch, the prompts are split over the processes and the results
    joined: torchrun --nproc-per-node 2 -m specdec bench CONFIG --out DIR. See docs/bench.md.
    """
    from specdec.bench.grid import load_cells

    cells = load_cells(config, overrides or [])  # wrong ones are told before the slow imports
    if only_list:
        _list(cells)
        return
    from specdec.bench.processes import joined_processes

    quiet_transformers()
    with joined_processes() as processes:
        if cells[0].settings:
            _sweep(cells, out, processes)
        else:
            _single(cells[0], out, processes)


def _list(cells: Sequence["Cell"]) -> None:
    for cell in cells:
        config = cell.config
        names = ["plain", "hf_generate", *(arm.name for arm in config.arms)]
        typer.echo(f"{cell.name or 'one bench'}: {', '.join(names)}")
    typer.echo(f"cells: {len(cells)}; in each of them every arm decodes the prompts in turn")


def _single(cell: "Cell", out: Path, processes: "Processes") -> None:
    from specdec.bench.runner import check_results, run_bench
    from specdec.report.table import results_table

    with _progress(processes) as show:
        results = run_bench(cell.config, out, show, processes=processes)
    if processes.is_first:
        _print(results_table, results)
        picture = _picture(results, out / "results.png")
        said = picture or "none, it needs specdec[plot]"
        typer.echo(f"Records and results: {out}\nPicture: {said}")
        _tell_failures(results["arms"])
        summary = {"schema": results["schema"], "picture": picture and str(picture)}
        typer.echo(json.dumps({**summary, "arms": _summary(results["arms"])}))
    check_results(results)


def _sweep(cells: Sequence["Cell"], out: Path, processes: "Processes") -> None:
    from specdec.bench.sweep import SWEEP, check_sweep, run_sweep
    from specdec.report.sweep_table import sweep_table

    with _progress(processes) as show:
        sweep = run_sweep(cells, out, show, processes)
    if processes.is_first:
        _print(sweep_table, sweep)
        typer.echo(f"Joined results: {out / SWEEP}")
        for cell in sweep["cells"]:
            if cell["error"]:
                typer.echo(f"specdec: cell {cell['name']} failed: {cell['error']}", err=True)
            _tell_failures(cell["arms"], f"cell {cell['name']}, ")
        rows = [{**cell, "arms": _summary(cell["arms"])} for cell in sweep["cells"]]
        typer.echo(json.dumps({"schema": sweep["schema"], "cells": rows}))
    check_sweep(sweep)


@contextmanager
def _progress(processes: "Processes") -> Iterator[Progress]:
    """A bar in the first process alone."""
    if not processes.is_first:
        yield lambda done, total, text: None
        return
    with progress_bar() as show:
        yield show


def _print(table: Callable[[dict[str, Any], int], Any], content: dict[str, Any]) -> None:
    from rich.console import Console

    terminal = Console(width=None if sys.stdout.isatty() else 140)
    terminal.print(table(content, terminal.width))


def _tell_failures(arms: list[dict[str, Any]], where: str = "") -> None:
    for arm in arms:
        if arm["failed"]:
            count, reason = f"{arm['failed']} of {arm['prompts']}", arm["failures"][0]["reason"]
            typer.echo(f"specdec: {where}{arm['name']}: {count} prompts failed: {reason}", err=True)


def _picture(results: dict[str, Any], path: Path) -> Path | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.plot import plot_results

    plot_results(results, path)
    return path


def _summary(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the last line of output, which is for machines, says of arms."""
    keys = (
        "name",
        "tau",
        "decode_tokens_per_s",
        "speedup_vs_plain",
        "speedup_vs_hf",
        "mismatches",
        "failed",
    )
    return [{key: arm[key] for key in keys} for arm in arms]
