"""`specdec report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import app, exit_statuses


@app.command()
@exit_statuses()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of bench, sweep, analysis, plan ...")],
    out: Annotated[Path, typer.Option(help="folder for index.html, report.md and report.json")],
    allow: Annotated[
        list[str] | None,
        typer.Option(help="compare benches that differ in this: target, prompts, sampling ..."),
    ] = None,
) -> None:
    """Put measurements into one page: tables, pictures, comparisons."""
    from specdec.report.page import write_report

    found = write_report(runs, out, allow or [])
    for warning in found.warnings:
        typer.echo(f"specdec: {warning}", err=True)
    page = str(out / "index.html")
    typer.echo(f"Page: {page}\nMarkdown: {out / 'report.md'}")
    figures = sum(len(section.figures) for section in found.sections)
    typer.echo(json.dumps({"schema": found.schema_, "page": page, "figures": figures}))
