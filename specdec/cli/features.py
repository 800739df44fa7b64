"""`specdec features`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import (
    app,
    exit_statuses,
    options_from,
    progress_bar,
    quiet_transformers,
)
from specdec.data.config import FeatureOptions


@app.command()
@exit_statuses()
@options_from(FeatureOptions, "options")
def features(
    answers: Annotated[
        Path, typer.Argument(help="a folder that regenerate wrote, or a JSONL file; see --check")
    ],
    options: FeatureOptions,
    target: Annotated[str | None, typer.Option(help="'demo', a folder or a hub id")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the store; a killed run resumes")] = (
        None
    ),
    target_dtype: Annotated[str | None, typer.Option(help="as --dtype of generate")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    quantization: Annotated[str | None, typer.Option(help="8bit or 4bit")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what it would take on the disk")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="ANSWERS is a store: compare the hashes of its files")
    ] = False,
) -> None:
    """Store what the target makes of its answers, for training without it."""
    if check:
        _check(answers)
        return
    if target is None or (out is None and not dry_run):
        raise ValueError("--target and --out must be given (--dry-run needs no --out)")
    from specdec.common.files import locked
    from specdec.data.features import FeaturePlan, extract_features, free_bytes
    from specdec.targets.load import load_ends, load_target

    quiet_transformers()
    if dry_run:
        plan = FeaturePlan(answers, load_ends(target, dtype=target_dtype, device=device), options)
        per_token, free = plan.num_bytes / plan.num_tokens, free_bytes(out or Path())
        size = {"bytes_per_token": round(per_token, 2), "bytes": plan.num_bytes, "free_bytes": free}
        typer.echo(json.dumps({**size, "tokens": plan.num_tokens}))
        return
    assert out is not None
    with locked(out):
        model = load_target(target, dtype=target_dtype, device=device, quantization=quantization)
        plan = FeaturePlan(answers, model, options)
        with progress_bar() as show:
            summary = extract_features(plan, model, out, show)
    typer.echo(json.dumps({"store": str(out), **summary}))


def _check(folder: Path) -> None:
    from specdec.data.feature_store import FeatureStore

    store = FeatureStore.open(folder)
    store.verify()
    sizes = {name: split.rows for name, split in store.index.splits.items()}
    typer.echo(json.dumps({"store": str(folder), "rows": sizes, "ok": True}))
