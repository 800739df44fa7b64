"""`specdec plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


@app.command()
@exit_statuses()
def plan(
    config: Annotated[
        str, typer.Argument(help="a bench's YAML, 'demo', or stated parameters with --roofline")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    out: Annotated[Path, typer.Option(help="folder for what is measured, and the plan")] = Path(
        "runs/plan"
    ),
    quick: Annotated[bool, typer.Option(help="measure few points, to try things out")] = False,
    roofline: Annotated[
        bool, typer.Option(help="estimate hardware that is not here; measures nothing")
    ] = False,
) -> None:
    """Measure costs, combine them with acceptance, and choose drafter and draft length."""
    if roofline and quick:
        raise typer.BadParameter("--quick measures few points, --roofline none: drop one of them")
    if roofline:
        _estimate(config, overrides or [], out)
    else:
        _plan(config, overrides or [], out, quick)


def _plan(config: str, overrides: list[str], out: Path, quick: bool) -> None:
    from specdec.bench.config import load_config

    settings = load_config(config, overrides)  # wrong ones are told before the slow imports
    from specdec.common.files import locked
    from specdec.planning.plan import run_plan
    from specdec.report.sections.plan import costs_table, not_trusted, plan_table, schedule_table
    from specdec.report.tables import print_tables

    quiet_transformers()
    with locked(out), progress_bar() as show:
        found = run_plan(settings, out, show, quick=quick)
    print_tables(costs_table(found), schedule_table(found), plan_table(found))
    for reason in found.costs.skipped:
        typer.echo(f"specdec: {reason}; it is left out", err=True)
    for warning in not_trusted(found):
        typer.echo(f"specdec: {out / 'plan.json'}: {warning}", err=True)
    typer.echo(f"Plan: {out / 'plan.json'}\nRuns the choice: specdec bench {out / 'bench.yaml'}")
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
    from specdec.common.files import locked
    from specdec.report.sections.plan import estimate_table
    from specdec.report.tables import print_tables

    found = estimate(hardware)
    with locked(out):
        found.write(out)
    print_tables(estimate_table(found))
    typer.echo("This is an estimate. It assumes:")
    for assumption in found.assumptions:
        typer.echo(f"- {assumption}")
    typer.echo(f"Estimate: {out / found.FILE}")
    best = [
        {"name": row.name, "batch_size": row.batch_size, "best": row.best.model_dump()}
        for row in found.drafters
    ]
    typer.echo(json.dumps({"schema": found.schema_, "label": found.label, "best": best}))
