"""`specdec train`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers


@app.command()
@exit_statuses()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, as in recipes/")],
    out: Annotated[Path, typer.Option(help="folder for checkpoints, log, results and drafter")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Train a drafter on a target's own answers; the same command resumes."""
    from specdec.train.config import load_train_config

    settings = load_train_config(config, overrides or [])
    from specdec.common.files import locked
    from specdec.train.parity import ParityError
    from specdec.train.run import run_training

    quiet_transformers()
    failure = None
    with locked(out, is_writer=os.environ.get("RANK", "0") == "0"):
        with progress_bar() as show:
            try:
                results = run_training(settings, out, show)
            except ParityError as error:  # everything is there, and worth a look
                failure, results = error, error.results
        if results is None:  # not the first process
            return
        picture = _curves(out)
        _card(results, out / "drafter", Path(settings.data.path))
    if failure is not None:
        raise failure
    used = json.dumps(results["drafter"])
    typer.echo(
        f"Drafter: {out / 'drafter'}\nCurves: {picture or 'none, they need specdec[plot]'}\n"
        f"{_parity(results['parity'])}\n"
        f"Use it: specdec generate --target {settings.target.path} --drafter '{used}' "
        "--prompt 'Hello'"
    )
    keys = ("drafter", "steps", "seconds", "loss", "validation_loss", "offline_tau", "alpha")
    typer.echo(json.dumps({key: results[key] for key in keys}))


def _parity(parity: dict[str, Any] | None) -> str:
    """What the gate found, in a line."""
    if parity is None:
        return "Parity gate: not run, so nothing says that decoding accepts what training measured"
    return (
        f"Parity gate: passed, decoding measures tau {parity['measured_tau']:.3f} where offline "
        f"acceptance predicts {parity['predicted_tau']:.3f} ({parity['shape']}, "
        f"{parity['num_prompts']} held-out prompts)"
    )


def _card(results: dict[str, Any], folder: Path, data: Path) -> None:
    """Describe the drafter in its folder, with what is known of where its data come from."""
    from specdec.common.files import read_json
    from specdec.data.answers import MANIFEST
    from specdec.report.cards import write_drafter_card

    manifest = data.expanduser() / MANIFEST
    answers = read_json(manifest) if manifest.is_file() else None
    write_drafter_card(results, folder, answers)


def _curves(out: Path) -> Path | None:
    """Draw the log; None without matplotlib, as `_picture`."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.quick_plots import plot_curves

    plot_curves(out / "log.jsonl", out / "curves.png")
    return out / "curves.png"
