"""`specdec generate`."""

import sys
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, quiet_transformers
from specdec.common.files import parse_json


@app.command()
@exit_statuses()
def generate(
    prompt: Annotated[str, typer.Option(help="what the user says; '-' reads standard input")],
    target: Annotated[str, typer.Option(help="'demo', a folder or a hub id")] = "demo",
    drafter: Annotated[str, typer.Option(help="'none', a name, or JSON with options")] = "ngram",
    raw: Annotated[bool, typer.Option(help="continue the text itself, without a chat")] = False,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option()] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Stream one answer, then say what speculation did for it."""
    from specdec.engine.decode import stream
    from specdec.registry import load_drafter
    from specdec.sampling.config import SamplingConfig
    from specdec.targets.load import load_target

    quiet_transformers()
    model = load_target(target, dtype=dtype, device=device)
    strategy = None if drafter == "none" else load_drafter(drafter_options(drafter), model)
    text = sys.stdin.read() if prompt == "-" else prompt
    has_chat = model.tokenizer is not None and model.tokenizer.chat_template and not raw
    asked: Any = [{"role": "user", "content": text}] if has_chat and text else text
    run = stream(
        model,
        strategy,
        [asked],
        SamplingConfig(temperature=temperature, top_p=top_p, seed=seed),
        max_new_tokens=max_new_tokens,
    )
    for chunk in run:
        typer.echo(chunk.text, nl=False)
    typer.echo()
    result = run.results()[0]
    typer.echo(
        f"[{len(result.tokens)} tokens, {result.finish_reason}; tau "
        f"{result.stats.accepted_length:.2f}, {result.decode_tokens_per_s:.0f} tokens/s, first "
        f"token after {1000 * result.ttft_s:.0f} ms]",
        err=True,
    )


def drafter_options(text: str) -> Any:
    """A drafter as it is given on the command line, for `load_drafter`."""
    if not text.startswith("{"):
        from specdec.registry import DRAFTERS, strategy

        # The demo's draft model is the only one that can be meant without a path.
        is_model = text in DRAFTERS and strategy(text).trained_as == "language_model"
        return {"type": text, "path": "demo"} if is_model else text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"drafter is {text!r} but must be a name or a JSON object ({error})"
        ) from error
