"""Sources of queries: files, read a record at a time, and data sets by name or from the hub."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from pydantic import Field

from specdec.bench.prompts import DATA_DIR_VARIABLE, require_data_dir
from specdec.common.config import Config
from specdec.common.hub import HUB, find_path

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_CHUNK_CHARS = 1 << 20
_GAP = re.compile(r"[\s,]*")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Record:
    """The value of a line, a row or an item of a list, and where it stands."""

    where: str
    value: Any


@dataclass(frozen=True)
class Malformed:
    """A line that is no record."""

    where: str
    text: str
    reason: str


Found = Record | Malformed


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


class DataSetRecords:
    """Rows of a split of a `datasets` data set; `size` counts them, `done` those that are read."""

    def __init__(self, name: str, rows: Any):
        self._name, self._rows = name, rows
        self.size, self.done = len(rows), 0

    def identity(self) -> DataSetIdentity:
        """Facts that change when the rows do."""
        fingerprint = self._rows._fingerprint
        return DataSetIdentity(data_set=self._name, rows=self.size, fingerprint=fingerprint)

    def __iter__(self) -> Iterator[Found]:
        for index, row in enumerate(self._rows):
            self.done = index + 1
            yield Record(f"{self._name}#{index}", row)


class FileRecords:
    """Records of one file, gzipped or not, read as they are asked for."""

    def __init__(self, path: Path, form: str | None = None):
        self.path, self.size, self.done = path, path.stat().st_size, 0  # in bytes
        self._form = form_of(path, form)

    def identity(self) -> FileIdentity:
        """Facts that change when the file does."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file's name may hold what is no Unicode.
        name = str(self.path).encode(errors="replace").decode()
        return FileIdentity(path=name, bytes=self.size, sha256=digest)

    def __iter__(self) -> Iterator[Found]:
        if self._form == "parquet":
            yield from self._parquet()
            return
        raw, file = _opened(self.path)
        with raw, file:
            try:
                for found in _READERS[self._form](str(self.path), file):
                    self.done = raw.tell()
                    yield found
            except _DAMAGED as error:
                yield Malformed(str(self.path), "", f"the file is damaged from here on: {error}")

    def _parquet(self) -> Iterator[Found]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                number, total = 0, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        self.done = self.size * number // total
                        yield Record(f"{self.path}#{number}", row)
        except ArrowException as error:
            raise ValueError(f"{self.path} is no Parquet file, or damaged: {error}") from error


Records = FileRecords | DataSetRecords


def form_of(path: Path, form: str | None = None) -> str:
    """The format of a file, by its suffix and its first character; see `FileRecords`."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    known = form or _SUFFIXES.get(suffix)
    if known == "parquet":
        return known
    with _opened(path)[1] as file:
        try:
            first = next((line for line in file if line.strip()), b"")
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if form or known not in (None, "jsonl"):
        return known or "text"
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        return "json"
    if start == b"{" and suffix == ".json" and not _is_json(first):
        raise ValueError(
            f"{path} holds one object over many lines; give a list of records, or JSONL"
        )
    return "jsonl" if start == b"{" or known == "jsonl" else "text"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _opened(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The file as it lies on the disk, and what is read of it."""
    raw: IO[bytes] = path.open("rb")
    return raw, cast(IO[bytes], gzip.open(raw)) if path.suffix == ".gz" else raw


def _read_text(name: str, file: IO[bytes]) -> Iterator[Found]:
    """Lines that are not blank."""
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield Malformed(where, line.decode(errors="replace"), f"not UTF-8 text: {error}")
            continue
        if text:
            yield Record(where, text)


def _read_jsonl(name: str, file: IO[bytes]) -> Iterator[Found]:
    for line in _read_text(name, file):
        if isinstance(line, Malformed):
            yield line
            continue
        try:
            yield Record(line.where, json.loads(line.value))
        except (ValueError, RecursionError) as error:
            yield Malformed(line.where, line.value, f"not JSON: {error}")


def _read_json(name: str, file: IO[bytes]) -> Iterator[Found]:
    """Items of a list, decoded one by one: such files are larger than memory."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder, number = json.JSONDecoder(), 0
    read = text.read(_CHUNK_CHARS)
    while not read.strip() and (more := text.read(_CHUNK_CHARS)):
        read += more
    at = read.find("[") + 1
    while True:
        at = _GAP.match(read, at).end()  # type: ignore[union-attr]
        if read.startswith("]", at):
            return
        reason = "it ends without ]"
        try:
            value, end = decoder.raw_decode(read, at)
            is_whole = end < len(read)  # a number may go on in the next chunk
        except (ValueError, RecursionError) as error:
            is_whole, reason = False, str(error)
        if is_whole:
            number, at = number + 1, end
            yield Record(f"{name}#{number}", value)
            continue
        more = text.read(max(_CHUNK_CHARS, len(read) - at))  # twice as much: linear in all
        if not more:
            reason = f"the list breaks off or is not JSON: {reason}"
            yield Malformed(f"{name}#{number + 1}", read[at:], reason)
            return
        read, at = read[at:] + more, 0


def _read_csv(name: str, file: IO[bytes], delimiter: str = ",") -> Iterator[Found]:
    csv.field_size_limit(1 << 30)
    # Bytes that are no UTF-8 spoil their own row only.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Malformed(f"{name}:{reader.line_num}", "", f"no CSV: {error}")
            continue
        if row is None:
            return
        where, shown = f"{name}:{reader.line_num}", delimiter.join(row)
        if row and not header:
            header = row
        elif row and len(row) != len(header):
            reason = f"it has {len(row)} fields but the header has {len(header)}"
            yield Malformed(where, shown, reason)
        elif not shown.isascii() and any("\udc80" <= c <= "\udcff" for c in shown):
            yield Malformed(where, shown.encode(errors="replace").decode(), "not UTF-8 text")
        elif row:
            yield Record(where, dict(zip(header, row, strict=True)))


def _read_tsv(name: str, file: IO[bytes]) -> Iterator[Found]:
    return _read_csv(name, file, "\t")


_READERS: dict[str, Callable[[str, IO[bytes]], Iterator[Found]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class NamedSource:
    """Where a data set's training part is, and what its rows ask."""

    file: str  # in the data folder
    record: Callable[[int, Row], Row | None] = lambda _, row: row  # None leaves a row out
    hub: Mapping[str, str] | None = None  # for `datasets.load_dataset`, if there is a loadable copy
    published: str = ""  # where it comes from, if not from the hub


def _dialogue(_: int, row: Row) -> Row:
    return {"conversations": [{"role": role, "content": text} for role, text in row["turns"]]}


def _unmeasured_dialogue(index: int, row: Row) -> Row | None:
    return _dialogue(index, row) if index % 10 else None  # every tenth is a prompt of the bench


def _task(_: int, row: Row) -> Row:
    example = row["instances"][0]
    return {"instruction": row["instruction"], "input": example["input"], **example}


_TURNS = 'a line a dialogue: {"id", "turns": [[role, text], ...]}'
NAMED_SOURCES: dict[str, NamedSource] = {
    "gsm8k": NamedSource(
        "gsm8k/train.jsonl", hub={"path": "openai/gsm8k", "name": "main", "split": "train"}
    ),
    "sgd": NamedSource(
        "sgd/train.jsonl",
        _dialogue,
        published=f"dstc8-schema-guided-dialogue, train, {_TURNS}",
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


@dataclass(frozen=True)
class QuerySource:
    """One source as the user names it."""

    name: str
    parts: Sequence[Records]
    named: NamedSource | None = None

    @property
    def done_percent(self) -> int:
        """Share of it that is read."""
        return 100 * sum(p.done for p in self.parts) // max(1, sum(p.size for p in self.parts))

    def __iter__(self) -> Iterator[Found]:
        index = 0
        for found in (found for part in self.parts for found in part):
            if self.named is None or isinstance(found, Malformed):
                yield found
                continue
            try:
                value = self.named.record(index, found.value)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(
                    f"{found.where} is no record of {self.name} as it was published "
                    f"({type(error).__name__}: {error}); restore the file"
                ) from error
            index += 1
            if value is not None:
                yield replace(found, value=value)


def open_source(
    name: str,
    *,
    form: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    data_dir: Path | None = None,
) -> QuerySource:
    """Find a source: a name of `NAMED_SOURCES`, else a file or folder, else a data set of the hub.

    A folder is one that `datasets` saved, or one of logs (its `.jsonl` and `.jsonl.gz` files), or
    one that `datasets` can load.
    """
    if name in NAMED_SOURCES:
        return _named(name, data_dir)
    path = find_path(name, f"a file, a folder or one of {', '.join(NAMED_SOURCES)}")
    if isinstance(path, str):
        return QuerySource(name, [_from_hub(name, {"path": path, "name": subset, "split": split})])
    if path.is_dir():
        return QuerySource(name, _folder(path, form, split))
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a folder; write it to a file first")
    return QuerySource(name, [FileRecords(path, form)])


def _named(name: str, data_dir: Path | None) -> QuerySource:
    source = NAMED_SOURCES[name]
    if data_dir is not None and (data_dir / source.file).is_file():
        return QuerySource(name, [FileRecords(data_dir / source.file)], source)
    require_data_dir(data_dir)
    if source.hub is None:
        raise FileNotFoundError(
            f"source {name!r}: {source.file} is not in {data_dir or 'any data folder'}, nor is it "
            f"on the hub; set {DATA_DIR_VARIABLE} to a folder that holds it (the original is "
            f"{source.published})"
        )
    find_path(HUB + source.hub["path"], "")  # says so
    return QuerySource(name, [_from_hub(name, source.hub)], source)


def _folder(path: Path, form: str | None, split: str | None) -> Sequence[Records]:
    if any((path / name).is_file() for name in _SAVED_TO_DISK):
        from datasets import load_from_disk

        return [_split_of(str(path), load_from_disk(str(path)), split)]
    logs = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
    if logs:
        return [FileRecords(log, form) for log in logs]
    return [_from_hub(str(path), {"path": str(path), "split": split})]


def _from_hub(name: str, arguments: Any) -> Records:
    from datasets import load_dataset

    try:
        loaded = load_dataset(**arguments)
    except Exception as error:  # the hub, the network and the file formats each raise their own
        raise FileNotFoundError(
            f"{name!r} is no file, folder or named source ({', '.join(NAMED_SOURCES)}), and could "
            f"not be read as a data set: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return _split_of(name, loaded, arguments.get("split"))


def _split_of(name: str, loaded: Any, split: str | None) -> Records:
    if not isinstance(loaded, dict):
        return DataSetRecords(name, loaded)
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded or (split is None and chosen != "train" and len(loaded) > 1):
        raise ValueError(f"{name} has the splits {', '.join(loaded)}; give one of them as --split")
    return DataSetRecords(f"{name}:{chosen}", loaded[chosen])
