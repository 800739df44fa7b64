"""`specdec collect`: a folder of queries from what users asked, or by recording it."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.cli.app import app, exit_statuses, options_from, progress_bar
from specdec.data.config import CollectSettings
from specdec.proxy.records import ProxyConfig

if TYPE_CHECKING:
    from specdec.data.collect import CollectReport
    from specdec.report.tables import Table

DEFAULT_COMMAND = "from"


class DefaultCommandGroup(TyperGroup):
    """A group whose first word may be left out: sources follow `collect` at once.

    A source that is called as a subcommand is reached by its path (`./proxy`).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before arguments that name no other one."""
        if not args or args[0] not in self.commands:
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


collect_app = typer.Typer(cls=DefaultCommandGroup)
app.add_typer(
    collect_app,
    name="collect",
    help="Collect queries from logs, files and data sets, or by recording them.",
)


def _require(what: str, *modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{what} needs {', '.join(missing)}; install with: pip install 'specdec[collect]'"
        )


@collect_app.command(DEFAULT_COMMAND)
@exit_statuses()
@options_from(CollectSettings, "settings")
def collect(
    sources: Annotated[
        list[str],
        typer.Argument(help="files, folders, data sets of the hub, or gsm8k, sgd, banking77, ..."),
    ],
    out: Annotated[Path, typer.Option(help="folder for the queries")],
    settings: CollectSettings,
    append: Annotated[bool, typer.Option("--append", help="add to those in the folder")] = False,
) -> None:
    """Collect what was asked into a folder; `specdec collect proxy` records it."""
    _require("collecting", "datasets", "datasketch", "phonenumbers", "py3langid", "stdnum")
    from datasets.utils.logging import disable_progress_bar

    from specdec.common.files import locked
    from specdec.common.records import DATA_DIR_VARIABLE
    from specdec.data.collect import collect as collect_queries

    disable_progress_bar()
    given = os.environ.get(DATA_DIR_VARIABLE)
    data_dir = Path(given) if given else None
    where = out.resolve()
    lock = where.with_name(f".{where.name}.lock")  # the folder itself is replaced
    with locked(out, lock), progress_bar() as show:
        report = collect_queries(
            sources, out, settings, append=append, data_dir=data_dir, show=show
        )
    _print(report, out)


def _print(report: "CollectReport", out: Path) -> None:
    """Print what was kept and dropped: a table for people, a last line for machines."""
    from specdec.report.tables import print_tables

    print_tables(_table(report))
    for warning in report.warnings:
        typer.echo(f"specdec: {warning}", err=True)
    typer.echo(f"Queries: {out}\nCard: {out / 'README.md'}")
    facts = report.model_dump(by_alias=True, include={"schema_", "fingerprint", "kept", "domains"})
    dropped = {name: drop.count for name, drop in report.dropped.items() if drop.count}
    typer.echo(json.dumps({"out": str(out), **facts, "dropped": dropped}))


def _table(report: "CollectReport") -> "Table":
    from rich.markup import escape

    from specdec.data.collect import REASONS
    from specdec.report.tables import Column, Table

    rows: list[tuple[str, int, str]] = []
    for domain, counts in report.domains.items():
        rows += [(f"kept: {split} {domain}".rstrip(), count, "") for split, count in counts]
    for name, drop in report.dropped.items():
        shown = " ".join(f"{each.where} {each.quote}" for each in drop.examples[:1]).strip()
        rows += [(f"dropped: {REASONS[name]}", drop.count, shown)] if drop.count else []
    rows += [(f"masked: {mask}", count, "") for mask, count in report.masked.items() if count]
    return Table(
        id="collection",
        caption="",
        columns=[
            Column("fate", ""),
            Column("queries", "queries", 0),
            Column("example", "for example"),
        ],
        rows=[{"fate": escape(f), "queries": n, "example": escape(e)} for f, n, e in rows],
    )


@collect_app.command("proxy")
@exit_statuses()
@options_from(ProxyConfig, "config")
def proxy(config: ProxyConfig) -> None:
    """Record requests and answers on their way to an OpenAI-compatible server."""
    _require("the proxy", "starlette", "uvicorn", "httpx")
    from specdec.proxy.server import serve

    serve(config, say=lambda text: typer.echo(f"specdec: {text}", err=True))
