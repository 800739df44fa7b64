"""Records of files and data sets, read one at a time: JSON lines and lists, text, CSV, Parquet."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from specdec.common.distribution import install
from specdec.common.files import parse_json
from specdec.common.hub import HUB, find_path

DATA_DIR_VARIABLE = "SPECDEC_DATA_DIR"
_FORMS = {".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
_FORMS |= {f".{form}": form for form in ("jsonl", "csv", "tsv", "parquet")}
_CHUNK_CHARS = 1 << 20
_GAP = re.compile(r"[\s,]*")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, ValueError)  # the last of pyarrow and UTF-8


@dataclass(frozen=True)
class Record:
    """A line, a row or an item of a list; with a `fault` that says why, it is only a text."""

    where: str
    value: Any
    fault: str = ""


class RecordFile:
    """Records of one file, gzipped or not; `done` of its `size` bytes are read.

    Lines of text keep their white space; those that are blank are left out.
    """

    def __init__(self, path: Path, form: str | None = None):
        self.path, self.size, self.done = path, path.stat().st_size, 0
        self._form = form_of(path, form)

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as raw:
            try:
                for record in _READERS[self._form](str(self.path), _unzipped(raw, self.path)):
                    self.done = raw.tell()
                    yield record
            except _DAMAGED as error:
                yield Record(str(self.path), "", f"the file is damaged from here on: {error}")
        self.done = self.size


class DataSetRecords:
    """Rows of a split of a `datasets` data set; `done` of its `size` rows are read."""

    def __init__(self, name: str, rows: Any):
        self.name, self.rows = name, rows
        self.size, self.done = len(rows), 0

    def __iter__(self) -> Iterator[Record]:
        for index, row in enumerate(self.rows):
            self.done = index + 1
            yield Record(f"{self.name}#{index}", row)


def form_of(path: Path, form: str | None = None) -> str:
    """Tell the format of a file by its suffix and its first character, unless it is given."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    known = form or _FORMS.get(suffix)
    if known == "parquet":
        return known
    try:
        with path.open("rb") as raw:
            first = next((line for line in _unzipped(raw, path) if line.strip()), b"")
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if form or known not in (None, "jsonl"):
        return known or "text"
    start = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"{" and suffix == ".json":
        try:
            parse_json(first)
        except ValueError as error:
            what = f"holds one object over many lines, or is not JSON ({error})"
            raise ValueError(f"{path} {what}; give a list of records, or JSONL") from error
    return "json" if start == b"[" else "jsonl" if start == b"{" or known else "text"


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSONL file; `ValueError` names a line that holds none."""
    for record in sound(RecordFile(path, "jsonl")):
        if not isinstance(record.value, dict):
            raise ValueError(f"{record.where}: {record.value!r:.40} is no object; give one a line")
        yield record.value


def sound(records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
        if record.fault:
            raise ValueError(f"{record.where}: {record.fault}")
        yield record


def _unzipped(raw: IO[bytes], path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(raw)) if path.suffix == ".gz" else raw


def _read_text(name: str, file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            fault = "not UTF-8 text: it holds NUL characters" if "\0" in text else ""
        except UnicodeDecodeError as error:
            text, fault = line.decode(errors="replace"), f"not UTF-8 text: {error}"
        if text.strip():
            yield Record(where, text, fault)


def _read_jsonl(name: str, file: IO[bytes]) -> Iterator[Record]:
    for line in _read_text(name, file):
        try:
            yield line if line.fault else Record(line.where, parse_json(line.value))
        except ValueError as error:
            yield replace(line, fault=f"not JSON: {error}")


def _read_json(name: str, file: IO[bytes]) -> Iterator[Record]:
    """Read a list, whose items are decoded one by one: such files are larger than memory."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while text.read(1) not in ("[", ""):
        pass
    decoder, read, at, number = json.JSONDecoder(), "", 0, 0
    while True:
        at = cast(re.Match[str], _GAP.match(read, at)).end()
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
        elif more := text.read(max(_CHUNK_CHARS, len(read) - at)):  # twice as much: linear in all
            read, at = read[at:] + more, 0
        else:
            fault = f"the list breaks off or is not JSON: {reason}"
            yield Record(f"{name}#{number + 1}", read[at:], fault)
            return


def _read_csv(name: str, file: IO[bytes], delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    # Bytes that are no UTF-8 spoil their own row only.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Record(f"{name}:{rows.reader.line_num}", "", f"no CSV: {error}")
            continue
        if row is None:
            return
        shown, fault = delimiter.join(map(str, row.values())), ""
        if None in row or None in row.values():
            fault = f"it must have {len(rows.fieldnames or ())} fields as the header has"
        elif re.search("[\udc80-\udcff]", shown):
            fault = "not UTF-8 text"
        shown = shown.encode(errors="replace").decode()
        yield Record(f"{name}:{rows.reader.line_num}", shown if fault else row, fault)


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    batches = ParquetFile(file).iter_batches(batch_size=1024)
    for number, row in enumerate(chain.from_iterable(b.to_pylist() for b in batches), 1):
        yield Record(f"{name}#{number}", row)


_READERS: dict[str, Callable[[str, IO[bytes]], Iterator[Record]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": partial(_read_csv, delimiter="\t"),
    "parquet": _read_parquet,
}

Row = dict[str, Any]
Records = RecordFile | DataSetRecords


@dataclass(frozen=True)
class NamedSource:
    file: str  # in the data folder
    record: Callable[[int, Row], Any] = lambda _, row: row  # None leaves a row out
    hub: Mapping[str, str] | None = None  # for `datasets.load_dataset`, if there is a loadable copy
    published: str = ""  # where it comes from, if not from the hub


@dataclass(frozen=True)
class Source:
    name: str
    parts: Sequence[Records]
    named: NamedSource | None = None

    def __iter__(self) -> Iterator[Record]:
        index = 0
        for found in chain.from_iterable(self.parts):
            if self.named is None or found.fault:
                yield found
                continue
            try:
                value = self.named.record(index, found.value)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                what = f"{self.name} as it was published ({type(error).__name__}: {error})"
                raise ValueError(f"{found.where} is no record of {what}; restore it") from error
            index += 1
            if value is not None:
                yield replace(found, value=value)


def open_named(name: str, source: NamedSource, data_dir: Path | None) -> Source:
    """Open a published data set: in the data folder, else on the hub if it is there."""
    if data_dir is not None and not data_dir.is_dir():
        fix = f"mend {DATA_DIR_VARIABLE} or prompts.data_dir, or give neither to ask the hub"
        raise FileNotFoundError(f"the data folder {str(data_dir)!r} is not a folder; {fix}")
    if data_dir is not None and (data_dir / source.file).is_file():
        return Source(name, [RecordFile(data_dir / source.file)], source)
    fix = f"set {DATA_DIR_VARIABLE}, or prompts.data_dir of a bench, to a folder that holds it"
    missing = f"source {name!r}: {source.file} is not in {data_dir or 'any data folder'}"
    if source.hub is None:
        raise FileNotFoundError(f"{missing}, nor on the hub ({source.published}); {fix}")
    find_path(HUB + source.hub["path"], "")  # says so
    try:
        return Source(name, [load_split(name, source.hub)], source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{missing}, and {error}; {fix}") from error


def load_split(name: str, arguments: Mapping[str, Any]) -> DataSetRecords:
    """Load a split of a data set with these arguments of `datasets.load_dataset`."""
    path = arguments["path"]
    try:
        from datasets import load_dataset

        loaded = load_dataset(**arguments)
    except ImportError as error:
        fix = f"needs datasets: {install('collect')}"
        raise FileNotFoundError(f"reading {path} {fix}") from error
    except Exception as error:  # the hub, the network and the file formats each raise their own
        reason = str(error).split("\n")[0]
        what = f"could not be read as a data set: {type(error).__name__}: {reason}"
        raise FileNotFoundError(f"{path} {what}; check its name and the network") from error
    return choose_split(name, loaded, arguments.get("split"))


def choose_split(name: str, loaded: Any, split: str | None) -> DataSetRecords:
    """Take the split that is asked for, else "train" or the only one."""
    if not isinstance(loaded, dict):
        return DataSetRecords(name, loaded)
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded or (split is None and chosen != "train" and len(loaded) > 1):
        raise ValueError(f"{name} has the splits {', '.join(loaded)}; give one of them as --split")
    return DataSetRecords(f"{name}:{chosen}", loaded[chosen])
