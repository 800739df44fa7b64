"""Collected queries on the disk: folders of `specdec collect`, and files of one's own."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from specdec.common.config import Config, validated
from specdec.common.messages import Query, read_queries, short_hash
from specdec.common.records import read_objects

SPLITS = ("train", "held_out")


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


class _Turn(Config):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class _Row(Config):
    model_config = ConfigDict(extra="ignore")

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
        raise FileNotFoundError(
            f"{str(path)!r} does not exist; give a folder that collect wrote, or a JSONL file"
        )
    counts = Counter(query.id for queries in splits.values() for query in queries)
    if not counts:
        raise ValueError(f"{str(path)!r} holds no queries; give at least one")
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{str(path)!r} holds the query {name!r} twice; remove one: answers are kept by id"
        )
    return splits
