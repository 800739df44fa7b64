"""Sources of queries: files and folders, data sets by name or from the hub, and their identity."""

import hashlib
from pathlib import Path

from pydantic import Field

from specdec.common.config import Config
from specdec.common.hub import find_path
from specdec.common.records import (
    NamedSource,
    RecordFile,
    Records,
    Row,
    Source,
    choose_split,
    load_split,
    open_named,
)

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")
_TURNS = 'a line a dialogue: {"id", "turns": [[role, text], ...]}'


class FileIdentity(Config):
    """A file that was read."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str


class DataSetIdentity(Config):
    """A split of a data set that was read."""

    data_set: str
    rows: int = Field(ge=0)
    fingerprint: str = Field(description="fingerprint that `datasets` gives it")


def identify(part: Records) -> FileIdentity | DataSetIdentity:
    if not isinstance(part, RecordFile):
        fingerprint = part.rows._fingerprint
        return DataSetIdentity(data_set=part.name, rows=part.size, fingerprint=fingerprint)
    with part.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file's name may hold what is no Unicode.
    name = str(part.path).encode(errors="replace").decode()
    return FileIdentity(path=name, bytes=part.size, sha256=digest)


def _dialogue(_: int, row: Row) -> Row:
    return {"conversations": [{"role": role, "content": text} for role, text in row["turns"]]}


def _unmeasured_dialogue(index: int, row: Row) -> Row | None:
    return _dialogue(index, row) if index % 10 else None  # every tenth is a prompt of the bench


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
        _unmeasured_dialogue,
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
    name: str,
    *,
    form: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    data_dir: Path | None = None,
) -> Source:
    """Find a source: a name of `NAMED_SOURCES`, else a file or folder, else a data set of the hub.

    A folder is one that `datasets` saved, or one of logs (its `.jsonl` and `.jsonl.gz` files), or
    one that `datasets` can load.
    """
    if name in NAMED_SOURCES:
        return open_named(name, NAMED_SOURCES[name], data_dir)
    path = find_path(name, f"a file, a folder or one of {', '.join(NAMED_SOURCES)}")
    if isinstance(path, str):
        return Source(name, [load_split(name, {"path": path, "name": subset, "split": split})])
    if path.is_file():
        return Source(name, [RecordFile(path, form)])
    if not path.is_dir():
        raise ValueError(f"{name!r} is neither a file nor a folder; write it to a file first")
    if any((path / each).is_file() for each in _SAVED_TO_DISK):
        from datasets import load_from_disk

        return Source(name, [choose_split(str(path), load_from_disk(str(path)), split)])
    if logs := sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]):
        return Source(name, [RecordFile(log, form) for log in logs])
    return Source(name, [load_split(str(path), {"path": str(path), "split": split})])
