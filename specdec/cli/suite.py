"""`specdec bench` where the configuration is a suite's."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from specdec.cli.app import progress_bar, quiet_transformers


def bench_suite(config: str, overrides: Sequence[str], out: Path) -> None:
    """Run a suite, show its tables and draw its picture."""
    from rich.console import Console

    from specdec.bench.suites.config import load_suite

    load_suite(config, overrides)  # wrong ones are told before the slow imports
    from specdec.bench.suites.runner import check_suite, run_suite
    from specdec.report.suite_table import suite_tables

    quiet_transformers()
    with progress_bar() as show:
        results = run_suite(config, overrides, out, show)
    terminal = Console(width=None if sys.stdout.isatty() else 140)
    for table in suite_tables(results, terminal.width):
        terminal.print(table)
    picture = _picture(results, out / "suite.png")
    typer.echo(f"Records and results: {out}\nPicture: {picture or 'none, it needs specdec[plot]'}")
    typer.echo(json.dumps(_summary(results, picture)))
    check_suite(results)


def _picture(results: dict[str, Any], path: Path) -> Path | None:
    """Draw the results; None without matplotlib, which is an extra: the figures stand anyway."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.suite_plot import plot_suite

    plot_suite(results, path)
    return path


def _summary(results: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """The last line of output, for machines."""
    keys = ("name", "tau", "decode_tokens_per_s", "speedup_vs_plain", "mismatches", "failed")
    groups = [
        {"name": group["name"], "arms": [{key: arm[key] for key in keys} for arm in group["arms"]]}
        for group in results["groups"]
    ]
    where = {"schema": results["schema"], "suite": results["suite"]}
    return {**where, "picture": picture and str(picture), "groups": groups}
