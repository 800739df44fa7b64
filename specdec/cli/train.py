"""`specdec train`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.app import app, exit_statuses, progress_bar, quiet_transformers

if TYPE_CHECKING:
    from specdec.train.results import Parity, TrainResults


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
    from specdec.train.acceptance import ParityError
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
        _card(results, out / "drafter")
    if failure is not None:
        raise failure
    pushed = _push(results, out / "drafter")
    typer.echo(
        f"Drafter: {out / 'drafter'}{pushed}\n"
        f"Curves: {picture or 'none, they need specdec[plot]'}\n{_parity(results.parity)}\n"
        f"Use it: specdec generate --target {settings.target.path} --drafter "
        f"'{json.dumps(results.drafter)}' --prompt 'Hello'"
    )
    keys = {"drafter", "steps", "seconds", "loss", "validation_loss", "offline_tau", "alpha"}
    typer.echo(results.model_dump_json(include=keys))


def _parity(parity: "Parity | None") -> str:
    """Say in a line what the gate found."""
    if parity is None:
        return "Parity gate: not run, so nothing says that decoding accepts what training measured"
    return (
        f"Parity gate: passed, decoding measures tau {parity.measured_tau:.3f} where offline "
        f"acceptance predicts {parity.predicted_tau:.3f} ({parity.shape}, "
        f"{parity.num_prompts} held-out prompts)"
    )


def _card(results: "TrainResults", folder: Path) -> None:
    """Describe the drafter in its folder, with what is known of where its data come from."""
    from specdec.common.config import read_model
    from specdec.data.answers import MANIFEST, AnswersManifest
    from specdec.report.cards import write_drafter_card

    manifest = Path(results.provenance.config.data.path).expanduser() / MANIFEST
    answers = read_model(AnswersManifest, manifest) if manifest.is_file() else None
    write_drafter_card(results, folder, answers)


def _push(results: "TrainResults", folder: Path) -> str:
    """Upload the drafter with its card, where it is asked for; says where to."""
    chosen = results.provenance.config.training
    if not chosen.push_to_hub:
        return ""
    from huggingface_hub import upload_folder

    done = upload_folder(
        repo_id=str(chosen.hub_model_id),
        folder_path=folder,
        commit_message=f"A drafter of specdec, {results.steps} steps",
        revision=chosen.hub_revision,
    )
    return f", and at {done.commit_url}"


def _curves(out: Path) -> Path | None:
    """Draw the log; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from specdec.report.figures.analysis import plot_curves

    log = (out / "log.jsonl").read_text().splitlines()
    plot_curves([json.loads(line) for line in log], out / "curves.png")
    return out / "curves.png"
