"""Alpha of drafters on held-out queries, teacher-forced on what the target answered to them.

    python experiments/03-domain/alpha.py runs/domain/a-sgd --out alpha-sgd.json \
        generic=draft_model:runs/domain/generic-draft/drafter ...

Intervals are 95 % percentile bootstraps over queries.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import bootstrap

from specdec import load_target
from specdec.checkpoints import identify_target
from specdec.common.provenance import machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers, read_rows
from specdec.drafters.training import shifted
from specdec.registry import strategy
from specdec.train.acceptance import drafted_places, sum_of_overlaps
from specdec.train.data import OnlineSource
from specdec.train.trainees import DraftModelTrainee, HeadTrainee, Trainee, new_head


def load(kind: str, path: str, target: Any, identity: Any) -> Trainee:
    if strategy(kind).trained_as == "head":
        head = new_head(kind, {}, path, target, identity)
        return HeadTrainee(kind, head, identity, {}).eval()
    return DraftModelTrainee({"path": path, "method": "full"}, target, {}).eval()


@torch.no_grad()
def sums(trainee: Trainee, source: OnlineSource, rows: list[AnswerRow]) -> np.ndarray:
    """Of every row: places, and the overlaps at temperatures 0 and 1."""
    found = []
    for row in rows:
        batch = source.batch([row])
        mask = drafted_places(batch)
        guesses = trainee.guesses(batch, mask)
        overlaps = sum_of_overlaps(guesses, shifted(batch.target_logits, 1)[mask])
        found.append([int(mask.sum()), *overlaps.tolist()])
    return np.array(found)


def alpha(table: np.ndarray, column: int) -> dict[str, Any]:
    def ratio(places: np.ndarray, overlaps: np.ndarray, axis: int = -1) -> np.ndarray:
        return overlaps.sum(axis) / places.sum(axis)

    columns = (table[:, 0], table[:, column])
    low, high = bootstrap(
        columns, ratio, paired=True, vectorized=True, n_resamples=2000, rng=0, method="percentile"
    ).confidence_interval
    return {
        "value": float(ratio(*columns)),
        "interval": [float(low), float(high)],
    }


def main(
    answers: Path,
    drafters: Annotated[list[str], typer.Argument(help="name=kind:folder ...")],
    out: Annotated[Path, typer.Option()],
    num: int = 300,
) -> None:
    torch.set_num_threads(1)
    target = load_target("demo", device="cpu")
    identity = identify_target(target)
    check_answers_target(load_answers(answers), identity)
    rows = [row.cut(512) for row in read_rows(answers / "held_out.jsonl", target.vocab_size)]
    rows = [row for row in rows if row.num_answer_tokens > 1][:num]
    results = {}
    for given in drafters:
        name, _, where = given.partition("=")
        kind, _, path = where.partition(":")
        trainee = load(kind, path, target, identity)
        table = sums(trainee, OnlineSource(target, trainee.taps, torch.float32), rows)
        table = table[table[:, 0] > 0]
        results[name] = {
            "kind": kind,
            "places": int(table[:, 0].sum()),
            "alpha": {"0": alpha(table, 1), "1": alpha(table, 2)},
        }
        print(name, results[name])
    content = {"queries": len(rows), "drafters": results, "provenance": machine(target)}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
