"""`specdec export` and `serve`: hand a drafter to the engine that serves, or serve it here."""

from pathlib import Path

import typer

from specdec.cli.app import argument, command, option, quiet_transformers, warn
from specdec.cli.models import load_strategy


@command()
def export(
    drafter: str = argument(
        "a head or a draft model: a folder, a hub id, demo/NAME; a lookup's name; or JSON"
    ),
    to: str = option(..., "an engine, or a layout of heads; docs/engines.md lists them"),
    out: Path = option(..., "a folder that is new or empty"),
    target: str | None = option(None, "folder or hub id of the target that verifies"),
    num_tokens: int = option(5, "tokens drafted in a step"),
    dtype: str = option("auto", "float32, bfloat16 or float16 for the engine"),
    revision: str | None = option(None, "of a hub id"),
) -> None:
    """Write a drafter for an engine, with its config and launch line, or a head in a layout."""
    from specdec.checkpoints import LAYOUTS
    from specdec.engines.export import ENGINES, export, export_layout
    from specdec.registry import closest

    quiet_transformers()
    if to in LAYOUTS:
        head = export_layout(drafter, to, out, target, revision)
        typer.echo(f"{head.kind} head: {head.layout} -> {to}, {out}")
        return
    if to not in ENGINES:
        raise ValueError(
            f"--to is {to!r}, neither engine nor layout; {closest(to, [*ENGINES, *LAYOUTS])}"
        )
    made = export(drafter, to, out, target, num_tokens, dtype, revision)
    typer.echo(f"{made.kind} for {made.engine}: {', '.join(made.files)} in {made.folder}")
    for note in made.notes:
        typer.echo(f"Note: {note}")
    typer.echo(made.command)


@command()
def serve(
    target: str = option("demo", "'demo', a folder or a hub id"),
    drafter: str = option("none", "'none', a name, or JSON with options"),
    host: str = option("127.0.0.1", "address to listen on"),
    port: int = option(8000, "0 takes a free one"),
    max_rows: int = option(16, "requests decoded together, at most"),
    rule: str = option("token", "as in generate"),
    dtype: str | None = option(None),
    device: str | None = option(None),
    quantization: str | None = option(None, "of the target: 8bit or 4bit"),
) -> None:
    """Serve OpenAI's API with a drafter: for research, not for production."""
    from specdec.engine.engine import Engine
    from specdec.targets.load import load_target

    try:
        from specdec.serve import serve as run
    except ImportError as error:
        fix = "install with: pip install 'specdec[serve]'"
        raise ValueError(f"serving needs {error.name}; {fix}") from error
    quiet_transformers()
    model = load_target(target, dtype=dtype, device=device, quantization=quantization)
    engine = Engine(model, load_strategy(drafter, model), max_rows=max_rows, rule=rule)
    run(engine, target, host, port, warn)
