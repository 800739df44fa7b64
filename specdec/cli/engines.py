"""`specdec export`, `admit` and `serve`: in the engine that serves, and beside it."""

from pathlib import Path

import typer

from specdec.cli.app import argument, command, option, progress_bar, quiet_transformers, warn
from specdec.cli.models import load_strategy
from specdec.common.distribution import install
from specdec.engines.config import AdmitConfig


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
    from specdec.engines.export import export, export_layout

    quiet_transformers()
    if to in LAYOUTS:
        head = export_layout(drafter, to, out, target, revision)
        typer.echo(f"{head.kind} head: {head.layout} -> {to}, {out}")
        return
    made = export(drafter, to, out, target, num_tokens, dtype, revision)
    typer.echo(f"{made.kind} for {made.engine}: {', '.join(made.files)} in {made.folder}")
    typer.echo(made.command)
    if made.note:
        typer.echo(f"Note: {made.note}")


@command()
def admit(
    asked: AdmitConfig,
    drafter: str = argument("as in specdec export"),
    out: Path = option(Path("runs/admit"), "folder of the answers; the same command goes on there"),
) -> None:
    """Hold a drafter in a serving engine against our own loop: the same texts, the same counts."""
    from specdec.engines.admit import FILE, admit
    from specdec.report.cards import add_to_card, admission_table
    from specdec.report.tables import print_tables

    quiet_transformers()
    with progress_bar() as show:
        admission = admit(drafter, asked, out, show)
    print_tables(admission_table(admission))
    typer.echo(f"{admission.verdict}\nAll of it: {out / FILE}")
    if card := add_to_card(Path(drafter), admission):
        typer.echo(f"Card: {card}")
    if not admission.is_equal:
        raise SystemExit(1)


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
        fix = f"install with: {install('serve')}"
        raise ValueError(f"serving needs {error.name}; {fix}") from error
    quiet_transformers()
    model = load_target(target, dtype=dtype, device=device, quantization=quantization)
    engine = Engine(model, load_strategy(drafter, model), max_rows=max_rows, rule=rule)
    run(engine, target, host, port, warn)
