"""`specdec convert` and `specdec inspect`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, quiet_transformers
from specdec.demo import demo_path

_HEAD_HELP = "a draft head: a folder, a hub id, or demo/medusa, demo/eagle, demo/eagle3"


@app.command()
@exit_statuses()
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
    import warnings
    from dataclasses import replace

    from specdec.checkpoints import check_target, identify_target
    from specdec.drafters.heads import build_head, fill_head
    from specdec.targets.load import load_target

    quiet_transformers()
    model = load_target(target)
    identity = identify_target(model)
    with warnings.catch_warnings(action="ignore"):  # an older identity is about to be renewed
        check_target(checkpoint, identity)
    head = build_head(checkpoint.kind, checkpoint.options, model)
    fill_head(head, checkpoint.tensors, source)
    options = head.options.model_dump(exclude_none=True)
    return replace(checkpoint, options=options, target=identity)


@app.command()
@exit_statuses()
def inspect(
    source: Annotated[str, typer.Argument(help=_HEAD_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for machines")] = False,
    revision: Annotated[str | None, typer.Option(help="of a hub id")] = None,
) -> None:
    """Say what a draft head is: kind, layout, sizes, taps, vocabulary, target and training."""
    from specdec.checkpoints.folder import find_folder, size_on_disk
    from specdec.checkpoints.layouts import read_head
    from specdec.report.cards import head_facts, head_text

    folder = find_folder(_head_source(source), revision)
    checkpoint, num_bytes = read_head(folder), size_on_disk(folder)
    facts = head_facts(checkpoint, num_bytes)
    typer.echo(json.dumps(facts) if as_json else head_text(checkpoint, num_bytes))


def _head_source(source: str) -> str:
    """A folder or hub id; "demo/NAME" stands for an embedded head."""
    name = source.removeprefix("demo/")
    return str(demo_path(name)) if source != name and not Path(source).exists() else source
