"""`specdec features`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


@app.command()
@exit_statuses()
def features(
    answers: Annotated[
        Path, typer.Argument(help="a folder that regenerate wrote, or a JSONL file; see --check")
    ],
    target: Annotated[str | None, typer.Option(help="'demo', a folder or a hub id")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the store; a killed run resumes")] = (
        None
    ),
    taps: Annotated[
        str, typer.Option(help="eagle3, eagle, medusa, none, or hidden_states indices, with commas")
    ] = "eagle3,eagle",
    dtype: Annotated[str, typer.Option(help="of the taps: bf16 or float32")] = "bf16",
    top_k: Annotated[
        int, typer.Option(help="logits kept a token; 0: they are computed from the last tap")
    ] = 64,
    max_len: Annotated[
        int | None, typer.Option(help="rows are cut to so many tokens; default: the context")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="that the target reads at once")] = 4096,
    shard_mib: Annotated[int, typer.Option(help="MiB of a file, which is held in memory")] = 512,
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
    from specdec.common.config import validated
    from specdec.common.files import locked
    from specdec.data.features import FeatureOptions, FeaturePlan, extract_features, free_bytes
    from specdec.targets.load import load_target
    from specdec.targets.partial import load_ends

    given = {"taps": taps, "dtype": dtype, "top_k": top_k, "max_len": max_len}
    given |= {"batch_tokens": batch_tokens, "shard_mib": shard_mib}
    options = validated(FeatureOptions, given, noun="option")
    quiet_transformers()
    if dry_run:
        plan = FeaturePlan(answers, load_ends(target, dtype=target_dtype, device=device), options)
        per_token, free = plan.num_bytes / plan.total.tokens, free_bytes(out or Path())
        size = {"bytes_per_token": round(per_token, 2), "bytes": plan.num_bytes, "free_bytes": free}
        typer.echo(json.dumps({**size, "tokens": plan.total.tokens}))
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
