"""`specdec analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


@app.command()
@exit_statuses()
def analyze(
    config: Annotated[str, typer.Argument(help="a bench's YAML file, or 'demo'")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="texts in place of the target's answers: a folder of specdec regenerate, a JSONL "
            "file, or plain text"
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option(help="answers to every prompt; above temperature 0 more are steadier")
    ] = 1,
    out: Annotated[Path, typer.Option(help="folder for analysis and evidence")] = Path(
        "runs/analyze"
    ),
) -> None:
    """Work out draft strategies' acceptance along texts, without decoding with them."""
    from specdec.bench.config import load_config

    settings = load_config(config, overrides or [])  # wrong ones are told before the slow imports
    from specdec.analysis.run import run_analysis
    from specdec.common.files import locked
    from specdec.report.sections.analysis import analysis_table
    from specdec.report.tables import print_tables

    quiet_transformers()
    with locked(out), progress_bar() as show:
        analysis = run_analysis(settings, out, text, show, answers=answers)
    print_tables(analysis_table(analysis))
    typer.echo(f"Analysis and evidence: {out}")
    for each in analysis.drafters:
        if each.not_configured_because:
            typer.echo(f"specdec: {each.name}: {each.not_configured_because}", err=True)
    drafters = [
        {
            "name": each.name,
            "alpha": each.alpha,
            "tau": each.configured.tau if each.configured else None,
        }
        for each in analysis.drafters
    ]
    typer.echo(json.dumps({"schema": analysis.schema_, "drafters": drafters}))
