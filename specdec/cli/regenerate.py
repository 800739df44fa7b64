"""`specdec regenerate`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

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
    from specdec.common.config import validated
    from specdec.data.answers import AnswerSettings
    from specdec.data.dialogue import load_chat
    from specdec.data.queries import read_query_splits
    from specdec.data.regenerate import Answerer, LocalAnswers
    from specdec.data.regenerate import regenerate as answer
    from specdec.registry import load_drafter
    from specdec.targets.load import load_target

    given = {"temperatures": temperature or [0.0], "top_p": top_p, "turns": turns, "seed": seed}
    given |= {"max_new_tokens": max_new_tokens}
    settings = validated(AnswerSettings, given, noun="option")
    _check_source(target, endpoint, model, tokenizer)
    found = read_query_splits(queries)  # wrong ones are told before a target is loaded
    quiet_transformers()
    answers: Answerer
    with progress_bar() as show:
        if endpoint is None:
            loaded = load_target(str(target), dtype=dtype, device=device, quantization=quantization)
            options = None if drafter == "none" else drafter_options(drafter)
            strategy = None if options is None else load_drafter(options, loaded)
            answers = LocalAnswers(loaded, settings, strategy, batch_size)
        else:
            from specdec.data.endpoint import Endpoint, EndpointAnswers

            key = os.environ.get(api_key_variable, "")
            server = Endpoint(endpoint, str(model), key, attempts, timeout, concurrency)
            chat = load_chat(str(tokenizer or target))
            answers = EndpointAnswers(server, chat, settings, api)
        manifest = answer(found, out, answers, show)
    counts = manifest.counts
    failed = counts.train.failed + counts.held_out.failed
    if failed:
        total = counts.train.queries + counts.held_out.queries
        typer.echo(f"specdec: {failed} of {total} queries failed: {out / 'failed.jsonl'}", err=True)
    keys = {"counts", "answers", "answer_tokens", "unanswered_turns", "retokenized_answers"}
    rate = manifest.session.tokens_per_s
    brief = {**manifest.model_dump(include=keys), "tokens_per_s": rate}
    typer.echo(json.dumps({"answers_folder": str(out), **brief}))


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
