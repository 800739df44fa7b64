"""`specdec bench`."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers

if TYPE_CHECKING:
    from specdec.bench.config import BenchConfig
    from specdec.bench.runner import Processes
    from specdec.bench.sweep import Cell

Progress = Callable[[int, int, str], None]


@app.command()
@exit_statuses()
def bench(
    config: Annotated[
        str,
        typer.Argument(
            help="a YAML file: one bench, many with a grid: in it, or a suite:; 'demo' for the "
            "packaged bench, demo/single_turn and so on for the packaged suites"
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
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="let a plan choose a configuration, and measure it beside the arms"
        ),
    ] = False,
) -> None:
    """Measure draft strategies against plain decoding and transformers' generate.

    Under torchrun or accelerate launch, the processes share the prompts, and
    the results are joined.
    """
    from specdec.bench.config import is_suite
    from specdec.common.files import locked

    if is_suite(config):
        _check_suite_flags({"--list": only_list, "--auto": auto})
        with locked(out):
            bench_suite(config, overrides or [], out)
        return
    from specdec.bench.sweep import load_cells

    cells = load_cells(config, overrides or [])  # wrong ones are told before the slow imports
    if auto and cells[0].settings:
        raise ValueError(
            f"config {config!r} holds a grid, and --auto plans one bench; drop one of them"
        )
    if only_list:
        _list(cells)
        return
    from specdec.bench.runner import joined_processes, launched_processes

    quiet_transformers()
    with locked(out, is_writer=launched_processes().is_first), joined_processes() as processes:
        if auto:
            _planned(cells[0].config, out, processes)
        elif cells[0].settings:
            _sweep(cells, out, processes)
        else:
            _single(cells[0].config, out, processes)


def _list(cells: Sequence["Cell"]) -> None:
    for cell in cells:
        config = cell.config
        names = ["plain", "hf_generate", *(arm.name for arm in config.arms)]
        typer.echo(f"{cell.name or 'one bench'}: {' | '.join(names)}")
    typer.echo(f"cells: {len(cells)}; in each of them every arm decodes the prompts in turn")


def _single(
    config: "BenchConfig", out: Path, processes: "Processes", plan: dict[str, Any] | None = None
) -> None:
    from specdec.bench.runner import check_results, run_bench
    from specdec.report.tables import planned_table, results_table

    with _progress(processes) as show:
        results = run_bench(config, out, show, processes=processes)
    if processes.is_first:
        _print(lambda width: results_table(results, width))
        if plan:
            _print(lambda width: planned_table(plan, results))
        picture = _picture(results, out / "results.png")
        said = picture or "none, it needs specdec[plot]"
        typer.echo(f"Records and results: {out}\nPicture: {said}")
        _tell_failures(results["arms"])
        summary = {"schema": results["schema"], "picture": picture and str(picture)}
        if plan:
            summary["choice"] = plan["choice"]["name"]
        typer.echo(json.dumps({**summary, "arms": _summary(results["arms"])}))
    check_results(results)


def _planned(config: "BenchConfig", out: Path, processes: "Processes") -> None:
    """Measure what a plan chooses, and the arms that were given."""
    if processes.num > 1:
        raise ValueError("--auto measures the costs of one process; start it without a launcher")
    from specdec.bench.arms import add_choice
    from specdec.planning.plan import choose

    with _progress(processes) as show:
        chosen = choose(config, out / "plan", show)
    found = json.loads((out / "plan" / "plan.json").read_text())
    plan, arms = add_choice(found, chosen.arms, config.arms)
    before, now = found["choice"]["name"], plan["choice"]["name"]
    if now != before:
        typer.echo(
            f"The plan's choice {before!r} is not the arm of that name in the file; it is measured "
            f"beside it, as {now!r}"
        )
    _single(replace(config, arms=arms), out, processes, plan)


def _sweep(cells: Sequence["Cell"], out: Path, processes: "Processes") -> None:
    from specdec.bench.sweep import SWEEP, check_sweep, run_sweep
    from specdec.report.tables import sweep_table

    with _progress(processes) as show:
        sweep = run_sweep(cells, out, show, processes)
    if processes.is_first:
        _print(lambda width: sweep_table(sweep, width))
        typer.echo(f"Joined results: {out / SWEEP}")
        for cell in sweep["cells"]:
            if cell["error"]:
                typer.echo(f"specdec: cell {cell['name']} failed: {cell['error']}", err=True)
            _tell_failures(cell["arms"], f"cell {cell['name']}, ")
        rows = [{**cell, "arms": _summary(cell["arms"])} for cell in sweep["cells"]]
        typer.echo(json.dumps({"schema": sweep["schema"], "cells": rows}))
    check_sweep(sweep)


def _check_suite_flags(flags: dict[str, bool]) -> None:
    from specdec.bench.runner import launched_processes

    for flag, is_given in flags.items():
        if is_given:
            raise ValueError(f"{flag} is of benches and grids, and this is a suite; drop it")
    if launched_processes().num > 1:
        raise ValueError("a suite is served by one process; start it without a launcher")


@contextmanager
def _progress(processes: "Processes") -> Iterator[Progress]:
    """A bar in the first process alone."""
    if not processes.is_first:
        yield lambda done, total, text: None
        return
    with progress_bar() as show:
        yield show


def _print(table: Callable[[int], Any]) -> None:
    """Show a table that is made for the width of the terminal."""
    from rich.console import Console

    terminal = Console(width=None if sys.stdout.isatty() else 140)
    terminal.print(table(terminal.width))


def _tell_failures(arms: list[dict[str, Any]], where: str = "") -> None:
    for arm in arms:
        if arm["failed"]:
            count, reason = f"{arm['failed']} of {arm['prompts']}", arm["failures"][0]["reason"]
            typer.echo(f"specdec: {where}{arm['name']}: {count} prompts failed: {reason}", err=True)


def _picture(results: dict[str, Any], path: Path) -> Path | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.quick_plots import plot_results

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
        "end_to_end_speedup_vs_plain",
        "mismatches",
        "failed",
    )
    return [{key: arm[key] for key in keys} for arm in arms]


def bench_suite(config: str, overrides: Sequence[str], out: Path) -> None:
    """Run a suite, show its tables and draw its picture."""
    from rich.console import Console

    from specdec.bench.config import load_suite

    load_suite(config, overrides)  # wrong ones are told before the slow imports
    from specdec.bench.suites.runner import check_suite, run_suite
    from specdec.report.tables import suite_tables

    quiet_transformers()
    with progress_bar() as show:
        results = run_suite(config, overrides, out, show)
    terminal = Console(width=None if sys.stdout.isatty() else 140)
    for table in suite_tables(results, terminal.width):
        terminal.print(table)
    picture = _picture_of_suite(results, out / "suite.png")
    typer.echo(f"Records and results: {out}\nPicture: {picture or 'none, it needs specdec[plot]'}")
    typer.echo(json.dumps(_summary_of_suite(results, picture)))
    check_suite(results)


def _picture_of_suite(results: dict[str, Any], path: Path) -> Path | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.quick_plots import plot_suite

    plot_suite(results, path)
    return path


def _summary_of_suite(results: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """The last line of output, for machines."""
    keys = ("name", "tau", "decode_tokens_per_s", "speedup_vs_plain", "mismatches", "failed")
    groups = [
        {"name": group["name"], "arms": [{key: arm[key] for key in keys} for arm in group["arms"]]}
        for group in results["groups"]
    ]
    where = {"schema": results["schema"], "suite": results["suite"]}
    return {**where, "picture": picture and str(picture), "groups": groups}
