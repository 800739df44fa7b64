"""`specdec bench`, `analyze` and `plan`, and `report` of what they measured."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specdec.cli.app import argument, command, option, progress_bar, quiet_transformers, warn
from specdec.common.distribution import DISTRIBUTION
from specdec.common.files import locked
from specdec.report.tables import print_tables

if TYPE_CHECKING:
    from specdec.bench.config import Cell

# What the last line of output, which is for machines, says of an arm.
_SUITE_KEYS = ("name", "tau", "decode_tokens_per_s", "speedup_vs_plain", "mismatches", "failed")
_BENCH_KEYS = (*_SUITE_KEYS, "speedup_vs_hf", "end_to_end_speedup_vs_plain")


@command(watch="loop")
def bench(
    config: str = argument(
        "a YAML file: one bench, many with a grid: in it, or a suite:; 'demo' for the packaged "
        "bench, demo/single-turn and so on for the packaged suites"
    ),
    overrides: list[str] = argument("key=value ..., as in repeats=1 or grid.batch_size=[1,4]", []),
    out: Path = option(
        Path("runs/bench"), "folder for records and results; the same command resumes there"
    ),
    only_list: bool = option(False, "show the cells and their arms, and run nothing", "--list"),
    auto: bool = option(
        False, "let a plan choose a configuration, and measure it beside the arms", "--auto"
    ),
    endpoint: str | None = option(
        None, "ask a server for the answers, as http://localhost:8000/v1, in place of the arms"
    ),
    model: str | None = option(None, "its name of the model; needed if it serves several"),
    api_key_variable: str = option("SPECDEC_API_KEY", "environment variable with the server's key"),
    load: list[str] = option([], "JSON report of GuideLLM on the same server"),
) -> None:
    """Measure draft strategies against plain decoding and transformers' generate."""
    if endpoint is not None:
        if only_list or auto:
            raise ValueError("--list and --auto are of arms, and --endpoint has none; drop them")
        given = {"url": endpoint, "model": model, "load": load}
        _bake_off(config, overrides, out, {**given, "api_key_variable": api_key_variable})
        return
    from specdec.bench.config import load_cells

    cells = load_cells(config, overrides)
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
    _warn_of_machine(cells[0].config)
    with locked(out):
        if cells[0].settings:
            _sweep(cells, out)
        elif auto:
            _planned(cells[0].config, out)
        else:
            _run(cells[0].config, out)


def _warn_of_machine(config: Any) -> None:
    """Say at the start what will make the speeds of a run worthless."""
    from specdec.common.provenance import is_loaded, waits_passively
    from specdec.targets.load import find_device

    policy, device = os.environ.get("OMP_WAIT_POLICY"), find_device(config.target.device)
    found = waits_passively(device.type, config.threads, policy)
    for said in [*found, *is_loaded(os.getloadavg()[0], os.cpu_count() or 1)]:
        warn(said)


@command(name="bake-off")
def bake_off(
    config: str = argument("a YAML file of a bench or a suite, with endpoints: in place of arms"),
    overrides: list[str] = argument("key=value ..., as in repeats=1", []),
    out: Path = option(Path("runs/bake-off"), "folder for results; the same command resumes there"),
) -> None:
    """Measure servers, and engines that it starts, with drafters and without."""
    _bake_off(config, overrides, out)


def _bake_off(
    path: str, overrides: Sequence[str], out: Path, endpoint: dict[str, Any] | None = None
) -> None:
    from specdec.engines.bake_off import load_bake_off

    config = load_bake_off(path, overrides, endpoint)
    quiet_transformers()
    with locked(out):
        _run(config, out)


def _run(config: Any, out: Path, plan: Any = None) -> None:
    """Measure a bench, which a plan may have added to, a suite or a bake-off."""
    from specdec.bench.results import fastest_plain
    from specdec.bench.runner import check_results, run_bench
    from specdec.report.bench import plot, tables
    from specdec.report.plan import planned_table

    measure: Any = run_bench
    check: Any = check_results
    if is_bake_off := hasattr(config, "endpoints"):
        from specdec.engines.bake_off import check_bake_off, run_bake_off

        measure, check = run_bake_off, check_bake_off
    with progress_bar() as show:
        results = measure(config, out, show)
    print_tables(*tables(results), *([planned_table(plan, results)] if plan else []))
    picture = None  # without matplotlib, which is an extra, the figures stand anyway
    if find_spec("matplotlib"):
        picture = str((out / results.FILE).with_suffix(".png"))
        plot(results, Path(picture))
    shown = picture or f"none, it needs {DISTRIBUTION}[plot]"
    typer.echo(f"Records and results: {out}\nPicture: {shown}")
    summary = {"schema": results.schema_, "picture": picture}
    if hasattr(results, "suite"):
        groups = [{"name": g.name, "arms": _brief(g.arms, _SUITE_KEYS)} for g in results.groups]
        summary |= {"suite": results.suite, "groups": groups}
    else:
        _tell_failures(results.arms, noun=results.NOUN)
        choice = plan.choice.name if plan else getattr(results, "choice", None)
        keys = _SUITE_KEYS if is_bake_off else _BENCH_KEYS
        summary |= {"choice": choice} if choice is not None else {}
        summary |= {} if is_bake_off else {"fastest_plain": fastest_plain(results.arms)}
        summary |= {"arms": _brief(results.arms, keys)}
    typer.echo(json.dumps(summary))
    check(results)


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
    _run(config.model_copy(update={"arms": arms}), out, plan)


def _sweep(cells: Sequence["Cell"], out: Path) -> None:
    from specdec.bench.sweep import check_sweep, run_sweep
    from specdec.report.bench import sweep_table

    with progress_bar() as show:
        sweep = run_sweep(cells, out, show)
    print_tables(sweep_table(sweep))
    typer.echo(f"Joined results: {out / sweep.FILE}")
    rows = []
    for cell in sweep.cells:
        if cell.error:
            warn(f"cell {cell.name} failed: {cell.error}")
        _tell_failures(cell.arms, f"cell {cell.name}, ")
        arms = _brief(cell.arms, _BENCH_KEYS)
        rows.append({**cell.model_dump(exclude={"arms"}), "arms": arms})
    typer.echo(json.dumps({"schema": sweep.schema_, "cells": rows}))
    check_sweep(sweep)


def _tell_failures(arms: Sequence[Any], where: str = "", noun: str = "prompt") -> None:
    for arm in arms:
        if arm.failed:
            count, reason = f"{arm.failed} of {getattr(arm, f'{noun}s')}", arm.failures[0].reason
            warn(f"{where}{arm.name}: {count} {noun}s failed: {reason}")


def _brief(arms: Sequence[Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: getattr(arm, key) for key in keys} for arm in arms]


@command(watch="loop")
def analyze(
    config: str = argument("a bench's YAML file, or 'demo'"),
    overrides: list[str] = argument("key=value ...", []),
    text: Path | None = option(
        None,
        "texts in place of the target's answers: a folder of specdec regenerate, a JSONL file, or "
        "plain text",
    ),
    answers: int = option(1, "answers to every prompt; above temperature 0 more are steadier"),
    out: Path = option(Path("runs/analyze"), "folder for analysis and evidence"),
) -> None:
    """Work out draft strategies' acceptance along texts, without decoding with them."""
    from specdec.bench.config import load_config

    settings = load_config(config, overrides)  # wrong ones are told before the slow imports
    from specdec.analysis.run import run_analysis
    from specdec.report.analysis import analysis_table

    quiet_transformers()
    _warn_of_machine(settings)
    with locked(out), progress_bar() as show:
        analysis = run_analysis(settings, out, text, show, answers=answers)
    print_tables(analysis_table(analysis))
    typer.echo(f"Analysis and evidence: {out}")
    drafters = []
    for each in analysis.drafters:
        if each.not_configured_because:
            warn(f"{each.name}: {each.not_configured_because}")
        tau = each.configured.tau if each.configured else None
        drafters.append({"name": each.name, "alpha": each.alpha, "tau": tau})
    typer.echo(json.dumps({"schema": analysis.schema_, "drafters": drafters}))


@command(watch="loop")
def plan(
    config: str = argument("a bench's YAML, 'demo', or stated parameters with --roofline"),
    overrides: list[str] = argument("key=value ...", []),
    out: Path = option(Path("runs/plan"), "folder for what is measured, and the plan"),
    quick: bool = option(False, "measure few points, to try things out"),
    roofline: bool = option(False, "estimate hardware that is not here; measures nothing"),
) -> None:
    """Measure costs, combine them with acceptance, and choose drafter and draft length."""
    if roofline and quick:
        raise typer.BadParameter("--quick measures few points, --roofline none: drop one of them")
    if roofline:
        _estimate(config, overrides, out)
        return
    from specdec.bench.config import load_config

    settings = load_config(config, overrides)  # wrong ones are told before the slow imports
    from specdec.planning.plan import run_plan
    from specdec.report.plan import costs_table, not_trusted, plan_table, schedule_table

    quiet_transformers()
    _warn_of_machine(settings)
    with locked(out), progress_bar() as show:
        found = run_plan(settings, out, show, quick=quick)
    print_tables(costs_table(found), schedule_table(found), plan_table(found))
    file = out / found.FILE
    for reason in found.costs.skipped:
        warn(f"{reason}; it is left out")
    for reason in not_trusted(found):
        warn(f"{file}: {reason}")
    typer.echo(f"Plan: {file}\nRuns the choice: specdec bench {out / 'bench.yaml'}")
    keys = {"name", "type", "options", "predicted_speedup", "predicted_speedup_ci"}
    summary = {
        "schema": found.schema_,
        "choice": found.choice.model_dump(mode="json", include=keys),
        "schedule": found.schedule,
        "is_trusted": found.trust.is_trusted if found.trust else None,
    }
    typer.echo(json.dumps(summary))


def _estimate(path: str, overrides: list[str], out: Path) -> None:
    from specdec.planning.roofline import estimate, load_hardware

    hardware = load_hardware(path, overrides)
    from specdec.report.plan import estimate_table

    found = estimate(hardware)
    with locked(out):
        found.write(out)
    print_tables(estimate_table(found))
    typer.echo("\n- ".join(["This is an estimate. It assumes:", *found.assumptions]))
    typer.echo(f"Estimate: {out / found.FILE}")
    best = [
        {"name": row.name, "batch_size": row.batch_size, "best": row.best.model_dump()}
        for row in found.drafters
    ]
    typer.echo(json.dumps({"schema": found.schema_, "label": found.label, "best": best}))


@command()
def report(
    runs: list[Path] = argument("folders of bench, sweep, analysis, plan ...", []),
    out: Path = option(..., "folder for index.html, report.md and report.json"),
    allow: list[str] = option(
        [], "compare benches that differ in this: target, prompts, sampling ..."
    ),
    log: bool = option(
        False, "show performance logs over time: these files, or this machine's", "--log"
    ),
) -> None:
    """Put measurements into one page: tables, pictures, comparisons."""
    from specdec.bench.log import log_path
    from specdec.report.page import write_report

    known = log_path()
    logs = (runs or ([known] if known else [])) if log else []
    if not (runs or logs):
        fix = (
            "give folders of bench, analyze or plan, or --log, with its file if SPECDEC_LOG is off"
        )
        raise ValueError(f"no run is given; {fix}")
    found = write_report([] if log else runs, out, allow, logs)
    for warning in found.warnings:
        warn(warning)
    page = str(out / "index.html")
    typer.echo(f"Page: {page}\nMarkdown: {out / 'report.md'}")
    figures = sum(len(section.figures) for section in found.sections)
    typer.echo(json.dumps({"schema": found.schema_, "page": page, "figures": figures}))
