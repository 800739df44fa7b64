"""Records of files, one at a time: JSONL, JSON lists, text, CSV, TSV and Parquet."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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
