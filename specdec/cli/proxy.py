"""`specdec collect proxy`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import exit_statuses
from specdec.cli.collect import collect_app

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
    from specdec.proxy.server import serve
    from specdec.proxy.settings import Settings, parse_size
    from specdec.proxy.upstream import Upstream

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
