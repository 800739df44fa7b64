"""`specdec regenerate`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers
from specdec.cli.generate import drafter_options

_KEY_VARIABLE = "SPECDEC_API_KEY"


@app.command()
@exit_statuses()
def regenerate(
    queries: Annotated[Path, typer.Argument(help="a folder that collect wrote, or a JSONL file")],
    out: Annotated[Path, typer.Option(help="folder for the answers; a killed run resumes in it")],
    target: Annotated[str | None, typer.Option(help="'demo', a folder or a hub id")] = None,
    drafter: Annotated[
        str, typer.Option(help="'none', a name, or JSON with options; changes the speed alone")
    ] = "none",
    temperature: Annotated[
        list[float] | None, typer.Option(help="several make a mix; 0 if none is given")
    ] = None,
    top_p: Annotated[float, typer.Option()] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer")] = 512,
    turns: Annotated[str, typer.Option(help="'last', or 'all' after the target's own")] = "last",
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(help="rows decoded together")] = 32,
    dtype: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
    quantization: Annotated[str | None, typer.Option(help="of the target: 8bit or 4bit")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="ask a server instead, such as http://localhost:8000/v1")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the target, as the server calls it")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="the target's, for a server; --target will do as well")
    ] = None,
    api: Annotated[str, typer.Option(help="'chat' or 'completion' requests")] = "chat",
    concurrency: Annotated[int, typer.Option(help="queries asked at once")] = 16,
    attempts: Annotated[int, typer.Option(help="at a query, the first included")] = 6,
    timeout: Annotated[float, typer.Option(help="seconds for an answer")] = 600.0,
    api_key_variable: Annotated[
        str, typer.Option(help="environment variable with the server's key")
    ] = _KEY_VARIABLE,
) -> None:
    """Let the target answer the queries itself; the same command resumes and retries failures."""
    from specdec.data.answers import AnswerSettings
    from specdec.data.sources import read_query_splits

    settings = AnswerSettings(tuple(temperature or [0.0]), top_p, max_new_tokens, turns, seed)
    _check_source(target, endpoint, model, tokenizer)
    found = read_query_splits(queries)  # wrong ones are told before a target is loaded
    quiet_transformers()
    with progress_bar() as show:
        if endpoint is None:
            how: dict[str, Any] = {"dtype": dtype, "device": device, "quantization": quantization}
            manifest = _locally(found, out, str(target), how, drafter, settings, batch_size, show)
        else:
            server = {
                "url": endpoint,
                "model": model,
                "api_key": os.environ.get(api_key_variable, ""),
                "attempts": attempts,
                "timeout_s": timeout,
                "concurrency": concurrency,
            }
            read_with = str(tokenizer or target)
            manifest = _remotely(found, out, server, read_with, settings, api, show)
    _report(manifest, out)


def _check_source(
    target: str | None, endpoint: str | None, model: str | None, tokenizer: str | None
) -> None:
    """Refuse options that do not say who answers."""
    if endpoint is None:
        if target is None:
            raise ValueError("--target is missing; give 'demo', a folder or a hub id")
        if model is not None or tokenizer is not None:
            raise ValueError("--model and --tokenizer belong to --endpoint; give it, or drop them")
        return
    if model is None:
        raise ValueError("--endpoint needs --model: the target, as the server calls it")
    if target is None and tokenizer is None:
        raise ValueError(
            "--endpoint needs --tokenizer: a folder or hub id with the target's tokenizer and chat "
            "template"
        )
    for package in ("httpx", "tenacity"):
        if find_spec(package) is None:
            raise ValueError(
                f"--endpoint needs {package}; install it with: pip install 'specdec[collect]'"
            )


def _locally(
    found: Any,
    out: Path,
    target: str,
    how: dict[str, Any],
    drafter: str,
    settings: Any,
    batch_size: int,
    show: Any,
) -> dict[str, Any]:
    from specdec.data.regenerate import regenerate as answer
    from specdec.registry import load_drafter
    from specdec.targets.load import load_target

    model = load_target(target, **how)
    strategy = None if drafter == "none" else load_drafter(drafter_options(drafter), model)
    return answer(found, out, model, settings, strategy, batch_size, show)


def _remotely(
    found: Any,
    out: Path,
    server: dict[str, Any],
    tokenizer: str,
    settings: Any,
    api: str,
    show: Any,
) -> dict[str, Any]:
    from specdec.data.dialogue import load_chat
    from specdec.data.endpoint import Endpoint
    from specdec.data.regenerate import regenerate_from_endpoint

    endpoint, chat = Endpoint(**server), load_chat(tokenizer)
    return regenerate_from_endpoint(
        found, out, endpoint, chat, settings, api, server["concurrency"], show
    )


def _report(manifest: dict[str, Any], out: Path) -> None:
    """Say what came out; the last line is for machines."""
    counts = manifest["counts"]
    failed = sum(each["failed"] for each in counts.values())
    if failed:
        total = sum(each["queries"] for each in counts.values())
        typer.echo(f"specdec: {failed} of {total} queries failed: {out / 'failed.jsonl'}", err=True)
    keys = ("counts", "answers", "answer_tokens", "unanswered_turns", "retokenized_answers")
    brief = {key: manifest[key] for key in keys}
    rate = manifest["session"]["tokens_per_s"]
    typer.echo(json.dumps({"answers_folder": str(out), **brief, "tokens_per_s": rate}))
