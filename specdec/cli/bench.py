"""`specdec bench`."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


@app.command()
@exit_statuses()
def bench(
    config: Annotated[str, typer.Argument(help="a YAML file, or 'demo' for the packaged one")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    out: Annotated[Path, typer.Option(help="folder for records, results and picture")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure draft strategies against plain decoding and transformers' generate."""
    from specdec.bench.config import load_config

    settings = load_config(config, overrides or [])  # wrong ones are told before the slow imports
    from rich.console import Console

    from specdec.bench.runner import check_results, run_bench
    from specdec.report.table import results_table

    quiet_transformers()
    with progress_bar() as show:
        results = run_bench(settings, out, show)
    terminal = Console(width=None if sys.stdout.isatty() else 140)
    terminal.print(results_table(results, terminal.width))
    picture = _picture(results, out / "results.png")
    typer.echo(f"Records and results: {out}\nPicture: {picture or 'none, it needs specdec[plot]'}")
    for arm in results["arms"]:
        if arm["failed"]:
            count, reason = f"{arm['failed']} of {arm['prompts']}", arm["failures"][0]["reason"]
            typer.echo(f"specdec: {arm['name']}: {count} prompts failed: {reason}", err=True)
    typer.echo(json.dumps(_summary(results, picture)))
    check_results(results)


def _picture(results: dict[str, Any], path: Path) -> Path | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.plot import plot_results

    plot_results(results, path)
    return path


def _summary(results: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """The last line of output, for machines."""
    keys = (
        "name",
        "tau",
        "decode_tokens_per_s",
        "speedup_vs_plain",
        "speedup_vs_hf",
        "mismatches",
        "failed",
    )
    arms = [{key: arm[key] for key in keys} for arm in results["arms"]]
    return {"schema": results["schema"], "picture": picture and str(picture), "arms": arms}
