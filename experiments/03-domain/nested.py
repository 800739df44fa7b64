"""Smaller sets of answers out of a large one: each holds all rows of the smaller ones.

    python experiments/03-domain/nested.py runs/domain/a-sgd 100 500 2000 8000

writes runs/domain/a-sgd-100 and so on. Ids are hashes of the queries, so that their order is a
random one; the held-out rows are the same in all.
"""

import json
from pathlib import Path
from typing import Any

import typer

from specdec.data.answers import load_answers, write_answers


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(folder: Path, sizes: list[int]) -> None:
    answers = load_answers(folder)
    training = sorted(read(folder / "train.jsonl"), key=lambda row: row["id"])
    held_out = read(folder / "held_out.jsonl")
    for size in sizes:
        if size > len(training):
            raise typer.BadParameter(f"{size} rows are asked for but {folder} has {len(training)}")
        out = folder.with_name(f"{folder.name}-{size}")
        out.mkdir(parents=True, exist_ok=True)
        manifest = answers.model_copy(deep=True)
        manifest.counts.train.rows = size
        manifest.identity["first_rows_by_id"] = size
        write_answers(out, {"train": training[:size], "held_out": held_out}, [], manifest)


if __name__ == "__main__":
    typer.run(main)
