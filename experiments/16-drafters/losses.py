"""Train three kinds of heads with every loss, alike but for it, and measure offline acceptance.

python experiments/16-drafters/losses.py runs/features --out runs/losses

The features are those of answers that `scripts/train_demo.py answers` writes. Every run is a folder
below --out, and what is there is kept: a stopped experiment goes on with the same command.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from scipy.stats import t as student

from specdec.cli.app import quiet_transformers
from specdec.common.config import read_model
from specdec.common.files import write_json
from specdec.drafters.training import OBJECTIVES
from specdec.train.config import load_train_config
from specdec.train.results import TrainResults
from specdec.train.run import run_training

ROOT = Path(__file__).parents[2]
# The recipe of each kind of head, and what differs from it.
HEADS = {
    "eagle3": ("eagle3", []),
    "medusa": ("medusa", []),
    "mtp": ("eagle3", ["drafter.kind=mtp", "draft_vocab_size=null"]),
}
BASE, WEIGHTED = "cross_entropy", "d_pace"
FIGURES = ("tau", "alpha at T = 0", "alpha at T = 1")


class Run(NamedTuple):
    """One training run."""

    head: str
    objective: str
    weighting: str
    seed: int

    @property
    def loss(self) -> str:
        return self.objective + (f", {self.weighting}" if self.weighting == WEIGHTED else "")

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def trained_by(recipe: Path, changes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train a head, or go on with it, and take its offline acceptance; what is done is read."""
    config = load_train_config(str(recipe), list(changes))
    if (file := folder / TrainResults.FILE).exists():
        found = read_model(TrainResults, file)
        path: Any = {"data": {"path"}}
        if found.provenance.config.model_dump(exclude=path) != config.model_dump(exclude=path):
            raise ValueError(f"{str(folder)!r} has other settings; remove it or change --out")
    else:
        quiet_transformers()
        trained = run_training(config, folder)
        assert trained is not None  # a process alone is the first
        found = trained
    alpha = found.alpha or {}
    return {
        **dict(zip(FIGURES, (found.offline_tau, *alpha.values()), strict=True)),
        "acceptance": found.offline_acceptance,
        **found.model_dump(include={"rows", "steps", "tokens", "seconds"}),
        "provenance": found.provenance.model_dump(mode="json", exclude={"config", "command"}),
    }


def train(run: Run, out: Path, settings: Sequence[str]) -> tuple[Run, dict[str, Any]]:
    recipe, changes = HEADS[run.head]
    own = [f"loss.objective={run.objective}", f"loss.weighting={run.weighting}"]
    changes = [*changes, *own, f"training.seed={run.seed}", *settings]
    found = trained_by(ROOT / f"recipes/embedded/{recipe}.yaml", changes, out / run.name)
    return run, {**run._asdict(), "loss": run.loss, **found}


def in_processes(
    function: Callable[..., Any], wanted: Sequence[Sequence[Any]], what: str, workers: int
) -> Iterator[Any]:
    """Call a function with each tuple of arguments, and yield what is done."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = [pool.submit(function, *each) for each in wanted]
        console = Console(stderr=True)
        try:
            for done in track(as_completed(waiting), what, len(waiting), console=console):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval by Student's t."""
    given = np.array(values)
    value = float(given.mean())
    if len(given) < 2:
        return {"value": value, "ci": None}
    half = student.ppf(0.975, len(given) - 1) * given.std(ddof=1) / len(given) ** 0.5
    return {"value": value, "ci": [value - float(half), value + float(half)]}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of each head and loss, and what they are above those of cross-entropy, by seed."""
    found = []
    for head, loss in dict.fromkeys((run["head"], run["loss"]) for run in runs):
        some, base = (
            [run for run in runs if (run["head"], run["loss"]) == (head, each)]
            for each in (loss, BASE)
        )
        by_depth = zip(*(run["acceptance"] for run in some), strict=True)
        row: dict[str, Any] = {"head": head, "loss": loss}
        for key in FIGURES:
            row[key] = mean([run[key] for run in some])
            pairs = zip(some, base, strict=True)
            row[f"{key}, change"] = mean([mine[key] - its[key] for mine, its in pairs])
        # A depth that no chain reached has no acceptance.
        told = [[share for share in each if share is not None] for each in by_depth]
        found.append(
            row | {"acceptance": [float(np.mean(each)) if each else None for each in told]}
        )
    return found


def best(rows: Sequence[dict[str, Any]], head: str) -> str:
    """Objective with the highest mean tau of a head."""
    of_head = [row for row in rows if row["head"] == head]
    return str(max(of_head, key=lambda row: row["tau"]["value"])["loss"])


def main(
    answers: Annotated[Path, typer.Argument(help="a feature store, or a JSONL file of rows")],
    out: Annotated[Path, typer.Option(help="folder of all runs, and of losses.json")],
    rows: Annotated[int, typer.Option(help="read, held-out ones included")] = 1280,
    held_out: int = 150,
    steps: int = 150,
    num_seeds: int = 3,
    workers: Annotated[int, typer.Option(help="processes of one thread")] = 2,
) -> None:
    settings = [f"data.path={answers}", f"data.max_rows={rows}", f"data.num_validation={held_out}"]
    settings += [f"training.max_steps={steps}", f"training.warmup_steps={steps // 10}"]
    settings += [f'training.{key}_strategy="no"' for key in ("eval", "save")]
    settings += ["training.report_to=none", "parity.num_prompts=0", "threads=1"]

    def trained(wanted: list[Run], what: str) -> list[dict[str, Any]]:
        # The last seeds come last, for they are what may be cut short.
        order = sorted(wanted, key=lambda run: run.seed)
        found = {}
        for run, result in in_processes(
            train, [(run, out, settings) for run in order], what, workers
        ):
            print(f"{run.name}: offline tau {result['tau']:.3f}")
            found[run] = result
        return [found[run] for run in wanted]

    seeds = range(num_seeds)
    plain = [Run(h, name, "decay", seed) for h in HEADS for name in OBJECTIVES for seed in seeds]
    runs = trained(plain, "losses")
    first = summary(runs)
    runs += trained(
        [Run(h, best(first, h), WEIGHTED, s) for h in HEADS for s in seeds], "weighting"
    )
    budget = {"rows": rows - held_out, "held_out": held_out, "steps": steps, "seeds": num_seeds}
    results = {
        "schema": "specdec-losses-1",
        "provenance": runs[0]["provenance"],
        "budget": budget,
        "runs": [{k: v for k, v in run.items() if k != "provenance"} for run in runs],
        "summary": summary(runs),
    }
    write_json(out / "losses.json", results)


if __name__ == "__main__":
    typer.run(main)
