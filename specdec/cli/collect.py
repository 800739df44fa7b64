"""`specdec collect`: a folder of queries from what users asked, or by recording it."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.cli.app import app, exit_statuses, progress_bar

DEFAULT_COMMAND = "from"
_EXTRA = ("datasets", "datasketch", "phonenumbers", "py3langid", "stdnum")


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


@collect_app.command(DEFAULT_COMMAND)
@exit_statuses()
def collect(
    sources: Annotated[
        list[str],
        typer.Argument(help="files, folders, data sets of the hub, or gsm8k, sgd, banking77, ..."),
    ],
    out: Annotated[Path, typer.Option(help="folder for the queries")],
    append: Annotated[bool, typer.Option("--append", help="add to those in the folder")] = False,
    format: Annotated[
        str | None, typer.Option(help="jsonl, json, text, csv, tsv or parquet; told if not given")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="of a record, with the query or conversation")
    ] = None,
    split: Annotated[str | None, typer.Option(help="of a data set; train if not given")] = None,
    subset: Annotated[str | None, typer.Option(help="of a data set of the hub")] = None,
    turns: Annotated[
        str, typer.Option(help="of conversations: all, last or first user turns become queries")
    ] = "all",
    domain: Annotated[str | None, typer.Option(help="of all queries")] = None,
    domain_field: Annotated[str, typer.Option(help="of a record, with its domain")] = "domain",
    mask: Annotated[bool, typer.Option(help="mask addresses, numbers, cards and keys")] = True,
    phone_region: Annotated[str, typer.Option(help="of national phone numbers")] = "US",
    min_chars: Annotated[int, typer.Option(help="of the last user turn")] = 1,
    max_chars: Annotated[int, typer.Option(help="of a whole query")] = 32_000,
    near_duplicates: Annotated[
        float, typer.Option(help="similarity from which a query is dropped; 0 keeps all")
    ] = 0.8,
    held_out: Annotated[float, typer.Option(help="share of conversations to hold out")] = 0.1,
    num: Annotated[int | None, typer.Option(help="of queries, drawn by hash")] = None,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    tag_language: Annotated[bool, typer.Option("--tag-language", help="tell languages")] = False,
    max_bad: Annotated[int, typer.Option(help="malformed lines to skip before stopping")] = 100,
) -> None:
    """Collect what was asked into a folder; `specdec collect proxy` records it."""
    from specdec.data.collect import CollectSettings

    settings = CollectSettings(
        format=format,
        column=column,
        split=split,
        subset=subset,
        turns=turns,
        domain=domain,
        domain_field=domain_field,
        mask=mask,
        phone_region=phone_region,
        min_chars=min_chars,
        max_chars=max_chars,
        near_duplicates=near_duplicates,
        held_out=held_out,
        num=num,
        seed=seed,
        tag_language=tag_language,
        max_bad=max_bad,
    )
    _check_extra()
    from datasets.utils.logging import disable_progress_bar

    from specdec.bench.prompts import DATA_DIR_VARIABLE
    from specdec.common.files import locked
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


def _check_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"collecting needs {', '.join(missing)}; install with: pip install 'specdec[collect]'"
        )


def _print(report: dict[str, Any], out: Path) -> None:
    """What was kept and dropped: a table for people, a last line for machines."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(_table(report))
    for warning in report["warnings"]:
        typer.echo(f"specdec: {warning}", err=True)
    typer.echo(f"Queries: {out}\nCard: {out / 'README.md'}")
    counts = {name: drop["count"] for name, drop in report["dropped"].items() if drop["count"]}
    keys = ("schema", "fingerprint", "kept", "domains")
    typer.echo(
        json.dumps({"out": str(out), **{key: report[key] for key in keys}, "dropped": counts})
    )


def _table(report: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from specdec.data.collect import REASONS

    table = Table("", "queries", "for example", box=None, pad_edge=False)
    for domain, counts in report["domains"].items():
        for split, count in counts.items():
            table.add_row(f"kept: {split} {escape(domain)}".rstrip(), str(count), "")
    for name, drop in report["dropped"].items():
        if drop["count"]:
            example = drop["examples"][0] if drop["examples"] else {"where": "", "quote": ""}
            shown = f"{example['where']} {example['quote']}".strip()
            table.add_row(f"dropped: {REASONS[name]}", str(drop["count"]), escape(shown))
    for mask, count in report["masked"].items():
        if count:
            table.add_row(f"masked: {mask}", str(count), "")
    return table


_NEEDED = ("starlette", "uvicorn", "httpx")


@collect_app.command("proxy")
@exit_statuses()
def proxy(
    upstream: Annotated[str, typer.Option(help="root of the server, as http://127.0.0.1:8000")],
    out: Annotated[Path, typer.Option(help="folder for requests-00001.jsonl and so on")],
    upstream_key_env: Annotated[
        str | None,
        typer.Option(
            help="environment variable with the server's key, or user:password, that is sent where "
            "the client sends none"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")
    ] = 8800,
    sample: Annotated[float, typer.Option(help="share of requests to record, 0 to 1")] = 1.0,
    max_body: Annotated[
        str, typer.Option(help="larger requests and answers are served, not recorded")
    ] = "8M",
    max_file: Annotated[str, typer.Option(help="size at which the next file begins")] = "256M",
    max_total: Annotated[
        str, typer.Option(help="size of all files at which recording stops; serving goes on")
    ] = "10G",
    connect_timeout: Annotated[
        float,
        typer.Option(min=0.001, help="longest wait for a connection to the server, in s"),
    ] = 10.0,
    drain: Annotated[
        int, typer.Option(min=0, help="longest wait for running answers at the end, in seconds")
    ] = 30,
) -> None:
    """Record requests and answers on their way to an OpenAI-compatible server."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the proxy needs {', '.join(missing)}; install with: pip install 'specdec[collect]'"
        )
    from specdec.proxy.exchange import Settings, parse_size
    from specdec.proxy.server import Upstream, serve

    settings = Settings(
        out=out,
        sample=sample,
        max_body_bytes=parse_size(max_body),
        max_file_bytes=parse_size(max_file),
        max_total_bytes=parse_size(max_total),
    )
    login = os.environ.get(upstream_key_env, "").strip() if upstream_key_env else ""
    if upstream_key_env and not login:
        raise ValueError(
            "the environment variable that --upstream-key-env names is empty or not set; export "
            "the server's key under a name and give that name"
        )
    server = Upstream(upstream, connect_timeout, login=login)
    serve(server, settings, host, port, drain, _say)


def _say(text: str) -> None:
    typer.echo(f"specdec: {text}", err=True)
