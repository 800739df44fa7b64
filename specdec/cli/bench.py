"""`specdec bench`."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers

if TYPE_CHECKING:
    from specdec.bench.config import RunConfig
    from specdec.bench.sweep import Cell

# What the last line of output, which is for machines, says of an arm.
_SUITE_KEYS = ("name", "tau", "decode_tokens_per_s", "speedup_vs_plain", "mismatches", "failed")
_BENCH_KEYS = (*_SUITE_KEYS, "speedup_vs_hf", "end_to_end_speedup_vs_plain")


@app.command()
@exit_statuses()
def bench(
    config: Annotated[
        str,
        typer.Argument(
            help="a YAML file: one bench, many with a grid: in it, or a suite:; 'demo' for the "
            "packaged bench, demo/single-turn and so on for the packaged suites"
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
    """Measure draft strategies against plain decoding and transformers' generate."""
    from specdec.bench.sweep import load_cells
    from specdec.common.files import locked

    cells = load_cells(config, overrides or [])
    is_suite = "hf_generate" not in cells[0].config.baselines
    for flag, is_given in {"--list": only_list, "--auto": auto}.items():
        if is_given and is_suite:
            raise ValueError(f"{flag} is of benches and grids, and this is a suite; drop it")
    if auto and cells[0].settings:
        raise ValueError(
            f"config {config!r} holds a grid, and --auto plans one bench; drop one of them"
        )
    if only_list:
        for cell in cells:
            typer.echo(f"{cell.name or 'one bench'}: {' | '.join(cell.config.arm_names)}")
        typer.echo(f"cells: {len(cells)}; in each of them every arm decodes the prompts in turn")
        return
    quiet_transformers()
    with locked(out):
        if is_suite:
            _suite(cells[0].config, out)
        elif auto:
            _planned(cells[0].config, out)
        elif cells[0].settings:
            _sweep(cells, out)
        else:
            _single(cells[0].config, out)


def _single(config: "RunConfig", out: Path, plan: Any = None) -> None:
    from specdec.bench.runner import check_results, run_bench
    from specdec.report.figures.bench import plot_results
    from specdec.report.sections.bench import results_table
    from specdec.report.sections.plan import planned_table
    from specdec.report.tables import print_tables

    with progress_bar() as show:
        results: Any = run_bench(config, out, show)
    print_tables(results_table(results), *([planned_table(plan, results)] if plan else []))
    picture = _picture(plot_results, results, out / "results.png")
    _tell_failures(results.arms)
    summary = {"schema": results.schema_, "picture": picture}
    if plan:
        summary["choice"] = plan.choice.name
    typer.echo(json.dumps({**summary, "arms": _summary(results.arms, _BENCH_KEYS)}))
    check_results(results)


def _suite(config: "RunConfig", out: Path) -> None:
    from specdec.bench.runner import check_results, run_bench
    from specdec.report.sections.suite import plot_suite, suite_tables
    from specdec.report.tables import print_tables

    with progress_bar() as show:
        results: Any = run_bench(config, out, show)
    print_tables(*suite_tables(results))
    picture = _picture(plot_suite, results, out / "suite.png")
    groups = [
        {"name": group.name, "arms": _summary(group.arms, _SUITE_KEYS)} for group in results.groups
    ]
    summary = {"schema": results.schema_, "suite": results.suite, "picture": picture}
    typer.echo(json.dumps({**summary, "groups": groups}))
    check_results(results)


def _planned(config: Any, out: Path) -> None:
    """Measure what a plan chooses, and the arms that were given."""
    from specdec.bench.arms import add_choice
    from specdec.planning.plan import run_plan

    with progress_bar() as show:
        found = run_plan(config, out / "plan", show)
    plan, arms = add_choice(found, config.arms)
    if plan.choice.name != found.choice.name:
        typer.echo(
            f"The plan's choice {found.choice.name!r} is not the arm of that name in the file; it "
            f"is measured beside it, as {plan.choice.name!r}"
        )
    _single(config.model_copy(update={"arms": arms}), out, plan)


def _sweep(cells: Sequence["Cell"], out: Path) -> None:
    from specdec.bench.sweep import check_sweep, run_sweep
    from specdec.report.sections.bench import sweep_table
    from specdec.report.tables import print_tables

    with progress_bar() as show:
        sweep = run_sweep(cells, out, show)
    print_tables(sweep_table(sweep))
    typer.echo(f"Joined results: {out / sweep.FILE}")
    rows = []
    for cell in sweep.cells:
        if cell.error:
            typer.echo(f"specdec: cell {cell.name} failed: {cell.error}", err=True)
        _tell_failures(cell.arms, f"cell {cell.name}, ")
        arms = _summary(cell.arms, _BENCH_KEYS)
        rows.append({**cell.model_dump(exclude={"arms"}), "arms": arms})
    typer.echo(json.dumps({"schema": sweep.schema_, "cells": rows}))
    check_sweep(sweep)


def _picture(plot: Callable[[Any, Path], object], results: Any, path: Path) -> str | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    picture = None if find_spec("matplotlib") is None else str(path)
    if picture:
        plot(results, path)
    shown = picture or "none, it needs specdec[plot]"
    typer.echo(f"Records and results: {path.parent}\nPicture: {shown}")
    return picture


def _tell_failures(arms: Sequence[Any], where: str = "") -> None:
    for arm in arms:
        if arm.failed:
            count, reason = f"{arm.failed} of {arm.prompts}", arm.failures[0].reason
            typer.echo(f"specdec: {where}{arm.name}: {count} prompts failed: {reason}", err=True)


def _summary(arms: Sequence[Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: getattr(arm, key) for key in keys} for arm in arms]
