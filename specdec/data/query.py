"""A query that somebody asked, as it is collected, stored and answered."""

from dataclasses import asdict, dataclass
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
        language: ISO 639-1 code; may be empty.
        source: the file and line, or the data set and row, that it came from.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None
    domain: str = ""
    language: str = ""
    source: str = ""


def write_queries(queries: dict[str, list[Query]], folder: Path) -> None:
    """Write a `datasets` folder with one split for each key."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    names = ("id", "text", "answer", "domain", "language", "source")
    features = Features({"messages": List(message), **{name: Value("string") for name in names}})
    splits = {
        split: Dataset.from_list([asdict(query) for query in found], features=features)
        for split, found in queries.items()
    }
    DatasetDict(splits).save_to_disk(folder)


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
