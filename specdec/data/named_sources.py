"""Queries that go by a name: the training parts of public data sets, never the measured ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class NamedSource:
    """Where a data set's training part is, and what its rows ask.

    Attributes:
        file: its path in the data folder.
        record: from the index of a row and the row to a record that asks; None to leave it out.
        hub: arguments of `datasets.load_dataset`; None where the hub has no loadable copy.
        published: where it comes from, if not from the hub.
    """

    file: str
    record: Callable[[int, Row], Row | None]
    hub: Mapping[str, str] | None = None
    published: str = ""


def _dialogue(_: int, row: Row) -> Row:
    return {"conversations": [{"role": role, "content": text} for role, text in row["turns"]]}


def _unmeasured_dialogue(index: int, row: Row) -> Row | None:
    return _dialogue(index, row) if index % 10 else None  # every tenth is a prompt of the bench


def _task(_: int, row: Row) -> Row:
    example = row["instances"][0]
    return {"instruction": row["instruction"], "input": example["input"], **example}


NAMED_SOURCES: dict[str, NamedSource] = {
    "gsm8k": NamedSource(
        "gsm8k/train.jsonl",
        lambda _, row: row,
        {"path": "openai/gsm8k", "name": "main", "split": "train"},
    ),
    "sgd": NamedSource(
        "sgd/train.jsonl",
        _dialogue,
        published="dstc8-schema-guided-dialogue, train, a line a dialogue: "
        '{"id", "turns": [[role, text], ...]}',
    ),
    "taskmaster4": NamedSource(
        "taskmaster4/dialogs.jsonl",
        _unmeasured_dialogue,
        published="google-research-datasets/Taskmaster, TM-4, a line a dialogue: "
        '{"id", "turns": [[role, text], ...]}',
    ),
    "banking77": NamedSource(
        "banking77/train.csv",
        lambda _, row: {"text": row["text"]},
        {"path": "mteb/banking77", "split": "train"},
    ),
    "self_instruct": NamedSource(
        "self_instruct_seed/seed_tasks.jsonl",
        _task,
        published="tatsu-lab/stanford_alpaca, seed_tasks.jsonl",
    ),
}
