"""Records of files, one at a time: JSONL, JSON lists, text, CSV, TSV and Parquet."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol, cast

from specdec.bench.prompts import DATA_DIR_VARIABLE, read_lines, require_data_dir
from specdec.common.hub import HUB, find_path
from specdec.data.conversation import SPLITS, Query, read_queries

FORMATS = ("jsonl", "json", "text", "csv", "tsv", "parquet")
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


@dataclass(frozen=True)
class Record:
    """What a line, a row or an item of a list holds, and where it stands."""

    where: str
    value: Any


@dataclass(frozen=True)
class Malformed:
    """A line that is no record.

    Attributes:
        where: file and line.
        text: of it, as far as it can be shown.
        reason: why it is none.
    """

    where: str
    text: str
    reason: str


def form_of(path: Path, form: str | None = None) -> str:
    """The format of a file, by its suffix and its first character.

    Args:
        path: of the file, gzipped or not.
        form: one of `FORMATS`, which is then not told from the file.

    Raises:
        ValueError: text that is not UTF-8, or one JSON object of many lines.
    """
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
    if start == b"{" and suffix == ".json" and _is_cut(first):
        raise ValueError(
            f"{path} holds one object over many lines; give a list of records, or JSONL"
        )
    return "jsonl" if start == b"{" or known == "jsonl" else "text"


def _is_cut(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _opened(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The file as it lies on the disk, and what is read of it."""
    raw: IO[bytes] = path.open("rb")
    return raw, cast(IO[bytes], gzip.open(raw)) if path.suffix == ".gz" else raw


class FileRecords:
    """Records of one file, read as they are asked for.

    Attributes:
        path: of the file.
        num_bytes: of the file.
        done_bytes: of them, read so far.
    """

    def __init__(self, path: Path, form: str | None = None):
        """Find out the format, as `form_of`."""
        self.path, self.num_bytes, self.done_bytes = path, path.stat().st_size, 0
        self._form = form_of(path, form)

    def identity(self) -> dict[str, Any]:
        """Path, size and SHA-256, which tell whether the file is still the same."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"path": str(self.path), "bytes": self.num_bytes, "sha256": digest}

    def __iter__(self) -> Iterator[Record | Malformed]:
        if self._form == "parquet":
            yield from self._parquet()
            return
        raw, file = _opened(self.path)
        with raw, file:
            rows = getattr(self, f"_{self._form}")(file)
            try:
                for row in rows:
                    self.done_bytes = raw.tell()
                    yield row
            except _DAMAGED as error:
                yield Malformed(str(self.path), "", f"the file is damaged from here on: {error}")

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[str, str] | Malformed]:
        """Where a line stands and what it says; blank ones are left out."""
        for number, line in enumerate(file, 1):
            where = f"{self.path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield Malformed(where, line.decode(errors="replace"), f"not UTF-8 text: {error}")
                continue
            if text:
                yield where, text

    def _text(self, file: IO[bytes]) -> Iterator[Record | Malformed]:
        for line in self._lines(file):
            yield line if isinstance(line, Malformed) else Record(*line)

    def _jsonl(self, file: IO[bytes]) -> Iterator[Record | Malformed]:
        for line in self._lines(file):
            if isinstance(line, Malformed):
                yield line
                continue
            where, text = line
            try:
                yield Record(where, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield Malformed(where, text, f"not JSON: {error}")

    def _json(self, file: IO[bytes]) -> Iterator[Record | Malformed]:
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
                whole = end < len(read)  # a number may go on in the next chunk
            except (ValueError, RecursionError) as error:
                whole, reason = False, str(error)
            if whole:
                number, at = number + 1, end
                yield Record(f"{self.path}#{number}", value)
                continue
            more = text.read(max(_CHUNK_CHARS, len(read) - at))  # twice as much: linear in all
            if not more:
                where = f"{self.path}#{number + 1}"
                yield Malformed(where, read[at:], f"the list breaks off or is not JSON: {reason}")
                return
            read, at = read[at:] + more, 0

    def _csv(self, file: IO[bytes], delimiter: str = ",") -> Iterator[Record | Malformed]:
        csv.field_size_limit(1 << 30)
        # Bytes that are no UTF-8 spoil their own row only.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Malformed(f"{self.path}:{reader.line_num}", "", f"no CSV: {error}")
                continue
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = row
                continue
            where, shown = f"{self.path}:{reader.line_num}", delimiter.join(row)
            if len(row) != len(header):
                reason = f"it has {len(row)} fields but the header has {len(header)}"
                yield Malformed(where, shown, reason)
            elif not shown.isascii() and any("\udc80" <= c <= "\udcff" for c in shown):
                yield Malformed(where, shown.encode(errors="replace").decode(), "not UTF-8 text")
            else:
                yield Record(where, dict(zip(header, row, strict=True)))

    def _tsv(self, file: IO[bytes]) -> Iterator[Record | Malformed]:
        return self._csv(file, "\t")

    def _parquet(self) -> Iterator[Record | Malformed]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                number, total = 0, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        self.done_bytes = self.num_bytes * number // total
                        yield Record(f"{self.path}#{number}", row)
        except ArrowException as error:
            raise ValueError(f"{self.path} is no Parquet file, or damaged: {error}") from error


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


_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


class Records(Protocol):
    """Records that can be counted, and told from others."""

    num_bytes: int
    done_bytes: int

    def identity(self) -> dict[str, Any]:
        """What changes when the records do."""

    def __iter__(self) -> Iterator[Record | Malformed]: ...


@dataclass(frozen=True)
class QuerySource:
    """One source as the user names it.

    Attributes:
        name: that was given.
        parts: files or splits of it.
        named: how its rows ask, for a source of `NAMED_SOURCES`.
    """

    name: str
    parts: Sequence[Records]
    named: NamedSource | None = None

    @property
    def done_percent(self) -> int:
        """How much of it is read."""
        done, total = (sum(getattr(p, n) for p in self.parts) for n in ("done_bytes", "num_bytes"))
        return 100 * done // max(1, total)

    def __iter__(self) -> Iterator[Record | Malformed]:
        index = 0
        for part in self.parts:
            for found in part:
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


class DataSetRecords:
    """Rows of a split of a `datasets` data set; `num_bytes` counts rows."""

    def __init__(self, name: str, rows: Any):
        """Name the split, for messages."""
        self._name, self._rows = name, rows
        self.num_bytes, self.done_bytes = len(rows), 0

    def identity(self) -> dict[str, Any]:
        """Name, number of rows, and the fingerprint that `datasets` gives them."""
        return {
            "data_set": self._name,
            "rows": len(self._rows),
            "fingerprint": self._rows._fingerprint,
        }

    def __iter__(self) -> Iterator[Record]:
        for index, row in enumerate(self._rows):
            self.done_bytes = index + 1
            yield Record(f"{self._name}#{index}", row)


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

    Args:
        name: of it; `./sgd` is the folder where `sgd` is the named source.
        form: of files, as `form_of` takes it.
        split: of a data set; train unless it has only another one.
        subset: of a data set of the hub, which some need.
        data_dir: where the files of named sources are looked for before the hub is asked.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: there is, but it is not to be read so.
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


def _folder(path: Path, form: str | None, split: str | None) -> list[Records]:
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
