"""The command `specdec`. Bad input ends with status 2 and a message, a failed run with 1."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.demo import demo_path

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speculative decoding: generate text, measure draft strategies, train and convert heads.",
)

_HEAD_HELP = "a draft head: a folder, a hub id, or demo/medusa, demo/eagle, demo/eagle3"

BAD_INPUT = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)
FAILURES = (RuntimeError, MemoryError, FloatingPointError, OSError)


@contextmanager
def _exit_statuses() -> Iterator[None]:
    """Turn errors that are expected into a message and an exit status: 2 for bad input, else 1."""
    try:
        yield
    except BAD_INPUT as error:
        message, status = str(error), 2
    except FAILURES as error:
        message, status = f"the run failed: {_reason(error)}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the same command resumes a bench or a training", 130
    else:
        return
    typer.echo(f"specdec: {message}", err=True)
    raise typer.Exit(status)


def _reason(error: Exception) -> str:
    """The error's message; what torch says when memory runs out is put in words."""
    from specdec.targets.memory import is_out_of_memory

    if isinstance(error, MemoryError) or not is_out_of_memory(error):
        return str(error) or type(error).__name__
    return (
        f"out of memory ({str(error).splitlines()[0]}); give a shorter prompt or fewer new tokens, "
        "or load with a smaller dtype, quantization or on another device"
    )


@app.command()
@_exit_statuses()
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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from specdec.bench.runner import check_results, run_bench
    from specdec.report.table import results_table

    _quiet_transformers()
    console = Console(stderr=True)
    bar = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("loading", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

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


@app.command()
@_exit_statuses()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, as in recipes/")],
    out: Annotated[Path, typer.Option(help="folder for checkpoints, log, results and head")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Train a draft head on a target's own answers; the same command resumes."""
    from specdec.train.config import load_train_config

    settings = load_train_config(config, overrides or [])
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from specdec.train.run import run_training

    _quiet_transformers()
    bar = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(*bar, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        results = run_training(settings, out, show)
    if results is None:  # not the first process
        return
    picture = _curves(out)
    typer.echo(
        f"Head: {out / 'head'}\nCurves: {picture or 'none, they need specdec[plot]'}\n"
        f"Use it: specdec generate --target {settings.target.path} --drafter "
        f"'{json.dumps({'type': settings.head.kind, 'path': str(out / 'head')})}' --prompt 'Hello'"
    )
    keys = ("steps", "seconds", "loss", "validation_loss", "offline_tau", "offline_acceptance")
    summary = {"head": str(out / "head"), **{key: results[key] for key in keys}}
    typer.echo(json.dumps(summary))


def _curves(out: Path) -> Path | None:
    """Draw the log; None without matplotlib, as `_picture`."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.curves import plot_curves

    plot_curves(out / "log.jsonl", out / "curves.png")
    return out / "curves.png"


@app.command()
@_exit_statuses()
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
    from specdec.decode import Stream
    from specdec.registry import load_drafter
    from specdec.sampling_config import SamplingConfig
    from specdec.targets.load import load_target

    _quiet_transformers()
    model = load_target(target, dtype=dtype, device=device)
    strategy = None if drafter == "none" else load_drafter(_drafter_options(drafter), model)
    text = sys.stdin.read() if prompt == "-" else prompt
    has_chat = model.tokenizer is not None and model.tokenizer.chat_template and not raw
    asked: Any = [{"role": "user", "content": text}] if has_chat and text else text
    run = Stream(
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


@app.command()
@_exit_statuses()
def convert(
    source: Annotated[str, typer.Argument(help=_HEAD_HELP)],
    destination: Annotated[Path, typer.Argument(help="a folder that is new or empty")],
    to: Annotated[str, typer.Option(help="the layout to write; docs/checkpoints.md lists them")],
    target: Annotated[
        str | None, typer.Option(help="the head's target, for facts that the source leaves to it")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="of a hub id")] = None,
) -> None:
    """Write a draft head in another layout, tensor for tensor."""
    from specdec.checkpoints import read_head, write_head

    if destination.expanduser().exists() and any(destination.expanduser().iterdir()):
        raise ValueError(f"{str(destination)!r} is not empty; give a new folder")
    source = _head_source(source)
    checkpoint = read_head(source, revision)
    if target is not None:
        checkpoint = _completed(checkpoint, source, target)
    folder = write_head(checkpoint, destination, to)
    typer.echo(f"{checkpoint.kind} head: {checkpoint.layout} -> {to}, {folder}")


def _completed(checkpoint: Any, source: str, target: str) -> Any:
    """The checkpoint with all options that its target settles, and the target's identity."""
    from dataclasses import replace

    from specdec.checkpoints import check_target, identify_target, resolved_options
    from specdec.drafters.heads import build_head, fill_head
    from specdec.targets.load import load_target

    _quiet_transformers()
    model = load_target(target)
    identity = identify_target(model)
    check_target(checkpoint, identity)
    head = build_head(checkpoint.kind, checkpoint.options, model)
    fill_head(head, checkpoint.tensors, source)
    return replace(checkpoint, options=resolved_options(head), target=identity)


@app.command()
@_exit_statuses()
def inspect(
    source: Annotated[str, typer.Argument(help=_HEAD_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for machines")] = False,
    revision: Annotated[str | None, typer.Option(help="of a hub id")] = None,
) -> None:
    """Say what a draft head is: kind, layout, sizes, taps, vocabulary, target and training."""
    from specdec.checkpoints.folder import find_folder, size_on_disk
    from specdec.checkpoints.layouts import read_head
    from specdec.report.head import head_facts, head_text

    folder = find_folder(_head_source(source), revision)
    facts = head_facts(read_head(folder), size_on_disk(folder))
    typer.echo(json.dumps(facts) if as_json else head_text(facts))


def _head_source(source: str) -> str:
    """A folder or hub id; "demo/NAME" stands for an embedded head."""
    name = source.removeprefix("demo/")
    return str(demo_path(name)) if source != name and not Path(source).exists() else source


def _drafter_options(text: str) -> Any:
    if not text.startswith("{"):
        # The demo's draft model is the only one that can be meant without a path.
        return {"type": text, "path": "demo"} if text == "draft_model" else text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"drafter is {text!r} but must be a name or a JSON object") from error


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
