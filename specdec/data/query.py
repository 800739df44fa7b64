"""A query that somebody asked, as it is collected, stored and answered."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specdec.bench.prompt import Message

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Query:
    """What was asked, without who asked it.

    Attributes:
        id: hash of the text; the same query has the same one wherever it was found.
        messages: the chat up to a user's turn; empty for a completion.
        text: the raw prompt of a completion; empty for a chat.
        answer: that was recorded with it, for reference; drafters are never trained on it.
        domain: a tag that splits and results are told apart by; may be empty.
        language: ISO 639 code; may be empty.
        source: the file and line, or the data set and row, that it came from.
        conversation: hash of its first user turn; queries that share it are in the same split.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None
    domain: str = ""
    language: str = ""
    source: str = ""
    conversation: str = ""

    @property
    def last_turn(self) -> str:
        """What is asked last; of a completion, all of it."""
        return self.messages[-1]["content"] if self.messages else self.text


def write_queries(queries: dict[str, list[Query]], folder: Path) -> None:
    """Write a `datasets` folder with one split for each key."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    names = [field.name for field in fields(Query)]
    types = {name: List(message) if name == "messages" else Value("string") for name in names}
    splits = {
        split: Dataset.from_dict(
            {name: [getattr(query, name) for query in found] for name in names}, Features(types)
        )
        for split, found in queries.items()
    }
    # What is empty gets no file unless told to, and could then not be loaded (datasets 5.2).
    shards = {split: None if found else 1 for split, found in queries.items()}
    DatasetDict(splits).save_to_disk(folder, num_shards=shards)


def read_queries(folder: Path, split: str) -> list[Query]:
    """The queries of one split of a folder that `specdec collect` wrote.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is no such folder, or has no such split.
    """
    from datasets import load_from_disk

    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder; give one that collect wrote")
    try:
        found: Any = load_from_disk(str(folder))
        rows = found[split]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no split {split!r} of collected queries ({error}); give a "
            "folder that collect wrote"
        ) from error
    return [Query(**{**row, "messages": tuple(row["messages"])}) for row in rows]
