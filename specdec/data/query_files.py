"""Collected queries from disk: a folder that `specdec collect` wrote, or a JSONL file."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specdec.bench.prompt_files import read_lines
from specdec.data.query import SPLITS, Query, read_queries


def read_query_splits(path: Path) -> dict[str, list[Query]]:
    """The queries of every split.

    A line of a JSONL file holds `messages` (`{"role", "content"}` each) or `text`, and may hold
    `id`, `domain`, `language` and `split` ("train" or "held_out"; train if it is missing).

    Args:
        path: a folder as `write_queries` makes it, or a file.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no such folder or file, holds no query, or one id twice.
    """
    if path.is_dir():
        if find_spec("datasets") is None:
            raise ValueError(
                "a folder of collected queries needs datasets; install it with: "
                "pip install 'specdec[collect]'"
            )
        splits = {split: read_queries(path, split) for split in SPLITS}
    elif path.is_file():
        splits = _read_file(path)
    else:
        raise FileNotFoundError(
            f"{str(path)!r} does not exist; give a folder that collect wrote, or a JSONL file"
        )
    _check_ids(splits, path)
    return splits


def _read_file(path: Path) -> dict[str, list[Query]]:
    splits: dict[str, list[Query]] = {split: [] for split in SPLITS}
    for number, row in enumerate(read_lines(path), 1):
        try:
            split = row.get("split", "train")
            if split not in splits:
                raise ValueError(f"split is {split!r} but must be one of {', '.join(SPLITS)}")
            splits[split].append(_query(row))
        except ValueError as error:
            raise ValueError(f"{path}, query {number}: {error}") from error
    return splits


def _query(row: dict[str, Any]) -> Query:
    messages, text = row.get("messages"), row.get("text")
    if (messages is None) == (text is None):
        raise ValueError(f'it has the keys {sorted(row)} but needs either "messages" or "text"')
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text is {text!r} but must be text")
    if messages is not None and not isinstance(messages, list):
        raise ValueError(f"messages is {messages!r} but must be a list of messages")
    whole = json.dumps([messages, text], sort_keys=True)
    name = row.get("id") or hashlib.sha256(whole.encode()).hexdigest()[:16]
    return Query(
        id=str(name),
        messages=tuple(_message(each) for each in messages or ()),
        text=text or "",
        domain=str(row.get("domain") or ""),
        language=str(row.get("language") or ""),
    )


def _message(given: Any) -> dict[str, str]:
    role, content = (given.get("role"), given.get("content")) if isinstance(given, dict) else (0, 0)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {given!r} must be an object with the texts role and content")
    return {"role": role, "content": content}


def _check_ids(splits: dict[str, list[Query]], path: Path) -> None:
    seen: set[str] = set()
    for query in (query for queries in splits.values() for query in queries):
        if query.id in seen:
            raise ValueError(
                f"{str(path)!r} holds the query {query.id!r} twice; remove one: answers are kept "
                "by id, and a query in two splits would be trained on and held out"
            )
        seen.add(query.id)
    if not seen:
        raise ValueError(f"{str(path)!r} holds no queries; give at least one")
