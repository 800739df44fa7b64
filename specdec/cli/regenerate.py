"""`specdec regenerate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


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
        list[float] | None, typer.Option(help="give it several times for a mix; 0 if not given")
    ] = None,
    top_p: Annotated[float, typer.Option()] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer")] = 512,
    turns: Annotated[str, typer.Option(help="'last', or 'all' after the target's own")] = "last",
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option()] = 32,
    dtype: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Let the target answer the queries itself; the same command resumes and retries failures."""
    from specdec.data.query_files import read_query_splits
    from specdec.data.regenerate import AnswerSettings
    from specdec.data.regenerate import regenerate as answer

    settings = AnswerSettings(
        tuple(temperature or [0.0]), top_p, max_new_tokens, turns, seed
    )  # wrong ones are told before the slow imports
    found = read_query_splits(queries)
    if target is None:
        raise ValueError("--target is missing; give 'demo', a folder or a hub id")
    from specdec.cli.generate import drafter_options
    from specdec.registry import load_drafter
    from specdec.targets.load import load_target

    quiet_transformers()
    model = load_target(target, dtype=dtype, device=device)
    strategy = None if drafter == "none" else load_drafter(drafter_options(drafter), model)
    with progress_bar() as show:
        manifest = answer(found, out, model, settings, strategy, batch_size, show)
    _report(manifest, out)


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
