"""`specdec generate` and `train`, and `inspect` of draft heads."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specdec.cli.app import (
    CHECKPOINTS,
    COMPILE,
    DATA,
    DRAFTER,
    DTYPE,
    MEASURE,
    TARGET,
    argument,
    command,
    option,
    progress_bar,
    quiet_transformers,
    tell,
    warn,
)
from specdec.common import hub
from specdec.common.config import read_model
from specdec.common.distribution import DISTRIBUTION
from specdec.common.files import locked, replace_file
from specdec.demo import unpacked
from specdec.targets.options import Placement

if TYPE_CHECKING:
    from specdec.train.results import TrainResults

_HEAD = "a draft head: a folder, a hub id, or demo/medusa, demo/eagle, demo/eagle3"


@command(MEASURE, threads=True)
def generate(
    placement: Placement,
    prompt: str = option(..., "what the user says; '-' reads standard input"),
    target: str = option("demo", *TARGET),
    drafter: str = option("ngram", DRAFTER),
    raw: bool = option(False, "continue the text itself, without a chat", "--raw"),
    max_new_tokens: int = option(128, "tokens of the answer, at most"),
    temperature: float = option(0.0, "0 takes the likeliest token, 1 samples as the model says"),
    top_p: float = option(1.0, "sample from the likeliest tokens of this probability"),
    seed: int = option(0, "seed of the samples"),
    dtype: str | None = option(None, DTYPE),
    compile: str = option("false", COMPILE),
    plain: bool = option(True, "decode the same prompt plainly afterwards, for its speed"),
) -> None:
    """Stream one answer, then say what speculation did for it."""
    from specdec.common.provenance import is_loaded
    from specdec.engine.decode import generate as decode
    from specdec.engine.decode import stream
    from specdec.sampling.config import SamplingConfig
    from specdec.targets.load import load_target

    quiet_transformers()
    mode = {"true": True, "false": False}.get(compile, compile)
    model = load_target(target, dtype=dtype, compile=mode, **placement.model_dump())
    strategy = load_strategy(drafter, model)
    text = sys.stdin.read() if prompt == "-" else prompt
    has_chat = model.tokenizer is not None and model.tokenizer.chat_template and not raw
    asked: Any = [{"role": "user", "content": text}] if has_chat and text else text
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, seed=seed)
    compares = plain and strategy is not None
    for said in is_loaded(os.getloadavg()[0], os.cpu_count() or 1) if compares else ():
        warn(said)
    for each in (strategy, None) if compares else ():  # neither is timed cold
        decode(model, each, ["Hello"], max_new_tokens=4)
    run = stream(model, strategy, [asked], sampling, max_new_tokens=max_new_tokens)
    for chunk in run:
        typer.echo(chunk.text, nl=False)
    typer.echo()
    result, speed = run.results()[0], ""
    if compares and len(result.tokens) > 1:
        (alone,) = decode(model, None, [asked], sampling, max_new_tokens=len(result.tokens))
        ratio = result.decode_tokens_per_s / alone.decode_tokens_per_s
        speed = f" ({ratio:.2f} x plain decoding's {alone.decode_tokens_per_s:.0f})"
    typer.echo(
        f"[{len(result.tokens)} tokens, {result.finish_reason}; tau "
        f"{result.stats.accepted_length:.2f}, {result.decode_tokens_per_s:.0f} tokens/s{speed}, "
        f"first token after {1000 * result.ttft_s:.0f} ms]",
        err=True,
    )


def load_strategy(text: str, target: Any) -> Any:
    """Load a drafter as it is given on the command line; None for "none"."""
    from specdec.registry import DRAFTERS, drafter_options, load_drafter, strategy

    options: Any = drafter_options(text) if text.startswith("{") else text
    if text in DRAFTERS and strategy(text).trained_as == "language_model":
        options = {"type": text, "path": "demo"}  # the only one meant without a path
    return None if text == "none" else load_drafter(options, target)


@command(DATA, watch="loop", tells=True)
def train(
    config: str = argument("a YAML file, as in recipes/"),
    out: Path = option(..., "folder for checkpoints, log, results and drafter"),
    overrides: list[str] = argument("settings to change, as training.max_steps=60", []),
) -> None:
    """Train a drafter on a target's own answers; the same command resumes."""
    from specdec.train.config import load_train_config

    settings = load_train_config(config, overrides)
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
        picture = _describe(results, out)
    if failure is not None:
        raise failure
    parity = "not run, so nothing says that decoding accepts what training measured"
    if found := results.parity:
        parity = (
            f"passed, decoding measures tau {found.measured_tau:.3f} where offline acceptance "
            f"predicts {found.predicted_tau:.3f} ({found.shape}, {found.num_prompts} held-out "
            "prompts)"
        )
    if results.before and results.offline_tau:
        tau, alpha = f"{results.before.tau:.2f} → {results.offline_tau:.2f}", ""
        if results.before.alpha and results.alpha:
            alpha = f"; alpha at T = 0 {results.before.alpha['0']:.3f} → {results.alpha['0']:.3f}"
        typer.echo(f"Before → after, on held-out answers: tau {tau}{alpha}")
    typer.echo(
        f"Drafter: {out / 'drafter'}{_push(results, out / 'drafter')}\n"
        f"Curves: {picture}\nParity gate: {parity}\n"
        f"Use it: specdec generate --target {settings.target.path} --drafter "
        f"'{json.dumps(results.drafter)}' --prompt 'Hello'"
    )
    keys = {"drafter", "steps", "seconds", "loss", "validation_loss", "offline_tau", "alpha"}
    tell(results.model_dump(mode="json", include=keys))


def _describe(results: "TrainResults", out: Path) -> str:
    """Draw the log, and write the drafter's card with what is known of where its data come from."""
    from specdec.data.answers import MANIFEST, AnswersManifest
    from specdec.report.cards import drafter_card

    manifest = Path(results.provenance.config.data.path).expanduser() / MANIFEST
    answers = read_model(AnswersManifest, manifest) if manifest.is_file() else None
    replace_file(out / "drafter" / "README.md", drafter_card(results, answers).encode())
    if find_spec("matplotlib") is None:
        return f"none, they need {DISTRIBUTION}[plot]"
    from specdec.report.figures import curves

    log = (out / "log.jsonl").read_text().splitlines()
    replace_file(out / "curves.png", curves([json.loads(line) for line in log]))
    return str(out / "curves.png")


def _push(results: "TrainResults", folder: Path) -> str:
    """Upload the drafter with its card, where it is asked for; says where to."""
    chosen = results.provenance.config.training
    if not chosen.push_to_hub:
        return ""
    where, message = str(chosen.hub_model_id), f"A drafter of specdec, {results.steps} steps"
    done = hub.push(folder, where, message, chosen.hub_private_repo, chosen.hub_revision)
    return f", and at {done}"


@command(CHECKPOINTS)
def push(
    folder: Path = argument("folder of a drafter, as specdec train or specdec export writes it"),
    name: str = argument("repository on the hub, as owner/name; it is made if it is not there"),
    private: bool = option(False, "make a new repository that others cannot see", "--private"),
    revision: str | None = option(None, "branch to write to; main by default"),
) -> None:
    """Upload a drafter with its card to the hub, from where load_drafter("owner/name") has it."""
    done = hub.push(folder, name, "A drafter of specdec", private, revision)
    typer.echo(f"{done}\nUse it: specdec generate --drafter {name} --prompt 'Hello'")


@command(CHECKPOINTS)
def inspect(
    source: str = argument(_HEAD),
    as_json: bool = option(False, "print one JSON object, for machines", "--json"),
    revision: str | None = option(None, "revision of a hub id"),
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
    """A folder or hub id; "demo/NAME" stands for an embedded head, JSON types a foreign class."""
    if source.startswith("{"):
        from specdec.registry import drafter_options, strategy

        given = drafter_options(source)
        strategy(given.get("type"), typed=True)
        source = str(given.get("path", "demo"))
    return unpacked(source)
