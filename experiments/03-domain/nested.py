"""Smaller sets of answers out of a large one: each holds all rows of the smaller ones.

    python experiments/03-domain/nested.py runs/domain/a-sgd 100 500 2000 8000

writes runs/domain/a-sgd-100 and so on. Ids are hashes of the queries, so that their order is a
random one; the held-out rows are the same in all.
"""

import json
from pathlib import Path

import typer

from specdec.data.answers import AnswerLine, load_answers, write_answers


def read(path: Path) -> list[AnswerLine]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [AnswerLine(**{"retokenized": None, **row}) for row in rows]


def main(folder: Path, sizes: list[int]) -> None:
    answers = load_answers(folder)
    training = sorted(read(answers.path("train")), key=lambda row: row.id)
    held_out = read(answers.path("held_out"))
    for size in sizes:
        if size > len(training):
            raise typer.BadParameter(f"{size} rows are asked for but {folder} has {len(training)}")
        out = folder.with_name(f"{folder.name}-{size}")
        out.mkdir(parents=True, exist_ok=True)
        manifest = answers.manifest.model_copy(deep=True)
        manifest.counts.train.rows = size
        manifest.identity["first_rows_by_id"] = size
        write_answers(out, {"train": training[:size], "held_out": held_out}, [], manifest)


if __name__ == "__main__":
    typer.run(main)
