"""Queries: the sources that they are collected from, and the folders and files that hold them."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from specdec.common.config import Config, Count, validated
from specdec.common.files import file_hash
from specdec.common.hub import find_path
from specdec.common.messages import Query, read_queries, short_hash
from specdec.common.records import (
    NamedSource,
    RecordFile,
    Records,
    Row,
    Source,
    choose_split,
    load_split,
    open_named,
    read_objects,
)
from specdec.data.config import CollectSettings

SPLITS = ("train", "held_out")
_TURNS = 'a line a dialogue: {"id", "turns": [[role, text], ...]}'


class FileIdentity(Config):
    """A file that was read."""

    path: str
    bytes: Count
    sha256: str


class DataSetIdentity(Config):
    """A split of a data set that was read."""

    data_set: str
    rows: Count
    fingerprint: str = Field(description="fingerprint that `datasets` gives it")


def identify(part: Records) -> FileIdentity | DataSetIdentity:
    if not isinstance(part, RecordFile):
        fingerprint = part.rows._fingerprint
        return DataSetIdentity(data_set=part.name, rows=part.size, fingerprint=fingerprint)
    name = str(part.path).encode(errors="replace").decode()  # it may hold what is no Unicode
    return FileIdentity(path=name, bytes=part.size, sha256=file_hash(part.path))


def _dialogue(_: int, row: Row) -> Row:
    return {"conversations": [{"role": role, "content": text} for role, text in row["turns"]]}


def _task(_: int, row: Row) -> Row:
    example = row["instances"][0]
    return {"instruction": row["instruction"], "input": example["input"], **example}


NAMED_SOURCES: dict[str, NamedSource] = {
    "gsm8k": NamedSource(
        "gsm8k/train.jsonl", hub={"path": "openai/gsm8k", "name": "main", "split": "train"}
    ),
    "sgd": NamedSource(
        "sgd/train.jsonl", _dialogue, published=f"dstc8-schema-guided-dialogue, train, {_TURNS}"
    ),
    "taskmaster4": NamedSource(
        "taskmaster4/dialogs.jsonl",
        # Every tenth is a prompt of the bench.
        lambda index, row: _dialogue(index, row) if index % 10 else None,
        published=f"google-research-datasets/Taskmaster, TM-4, {_TURNS}",
    ),
    "banking77": NamedSource(
        "banking77/train.csv",
        lambda _, row: {"text": row["text"]},
        hub={"path": "mteb/banking77", "split": "train"},
    ),
    "self_instruct": NamedSource(
        "self_instruct_seed/seed_tasks.jsonl",
        _task,
        published="tatsu-lab/stanford_alpaca, seed_tasks.jsonl",
    ),
}


def open_source(
    name: str, settings: CollectSettings | None = None, data_dir: Path | None = None
) -> Source:
    """Find a source: a name of `NAMED_SOURCES`, else a file or folder, else a data set of the hub.

    A folder is one that `datasets` saved, or one of logs (its `.jsonl` and `.jsonl.gz` files), or
    one that `datasets` can load.
    """
    if name in NAMED_SOURCES:
        return open_named(name, NAMED_SOURCES[name], data_dir)
    path = find_path(name, f"a file, a folder or one of {', '.join(NAMED_SOURCES)}")
    settings = settings or validated(CollectSettings, {})
    form, split = settings.format, settings.split
    if isinstance(path, str):
        given = {"path": path, "name": settings.subset, "split": split}
        return Source(name, [load_split(name, given)])
    if path.is_file():
        return Source(name, [RecordFile(path, form)])
    if not path.is_dir():
        raise ValueError(f"{name!r} is neither a file nor a folder; write it to a file first")
    if any((path / each).is_file() for each in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        return Source(name, [choose_split(str(path), load_from_disk(str(path)), split)])
    if logs := sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]):
        return Source(name, [RecordFile(log, form) for log in logs])
    return Source(name, [load_split(str(path), {"path": str(path), "split": split})])


def write_queries(queries: dict[str, list[Query]], folder: Path) -> None:
    """Write a `datasets` folder with one split for each key."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    types: dict[str, Any] = {field.name: Value("string") for field in fields(Query)}
    types["messages"] = List({"role": Value("string"), "content": Value("string")})
    splits = {
        split: Dataset.from_dict(
            {name: [getattr(query, name) for query in found] for name in types}, Features(types)
        )
        for split, found in queries.items()
    }
    # What is empty gets no file unless told to, and could then not be loaded (datasets 5.2).
    shards = {split: None if found else 1 for split, found in queries.items()}
    DatasetDict(splits).save_to_disk(folder, num_shards=shards)


class _Turn(Config, extra="ignore"):
    role: str
    content: str


class _Row(Config, extra="ignore"):
    id: Any = None
    messages: list[_Turn] | None = None
    text: str | None = None
    split: Literal["train", "held_out"] = "train"
    domain: Any = None
    language: Any = None

    @model_validator(mode="after")
    def _check_kind(self) -> "_Row":
        if (self.messages is None) == (self.text is None):
            raise ValueError('it needs either "messages" or "text"')
        return self

    def query(self, row: dict[str, Any]) -> Query:
        whole = json.dumps([row.get("messages"), row.get("text")], sort_keys=True)
        return Query(
            id=str(self.id or short_hash(whole)),
            messages=tuple(turn.model_dump() for turn in self.messages or ()),
            text=self.text or "",
            domain=str(self.domain or ""),
            language=str(self.language or ""),
        )


def read_query_splits(path: Path) -> dict[str, list[Query]]:
    """Read the queries of every split, of a folder that `write_queries` made or of a file.

    A line of a JSONL file holds `messages` (`{"role", "content"}` each) or `text`, and may hold
    `id`, `domain`, `language` and `split` ("train" or "held_out"; train if it is missing).
    """
    splits: dict[str, list[Query]] = {split: [] for split in SPLITS}
    if path.is_dir():
        splits = {split: read_queries(path, split) for split in SPLITS}
    elif path.is_file():
        for number, row in enumerate(read_objects(path), 1):
            given = validated(_Row, row, f"{path}, query {number}:")
            splits[given.split].append(given.query(row))
    else:
        fix = "give a folder that collect wrote, or a JSONL file"
        raise FileNotFoundError(f"{str(path)!r} does not exist; {fix}")
    counts = Counter(query.id for queries in splits.values() for query in queries)
    if not counts:
        raise ValueError(f"{str(path)!r} holds no queries; give at least one")
    [(name, count)] = counts.most_common(1)
    if count > 1:
        raise ValueError(f"{str(path)!r} holds the query {name!r} twice; remove one")
    return splits
