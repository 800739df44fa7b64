"""The proxy's settings, its records, and the files that hold a record in each line."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from specdec.common.config import Config
from specdec.common.files import LineFile

_UNITS = {unit: 1024**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_NAME = re.compile(r"requests-(\d{5,})\.jsonl")


def parse_size(text: str) -> int:
    """Return bytes of "4096", "512K", "8M", "256MiB" or "1.5G"; units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; give bytes, at least 1, or 8M, 256MiB or 1.5G")
    return size


Size = Annotated[str, AfterValidator(lambda text: text if parse_size(text) else "")]


class ProxyConfig(Config):
    """How to reach the server, where to listen, and what to record."""

    upstream: str = Field(description="root of the server, as http://127.0.0.1:8000")
    out: Path = Field(description="folder for requests-00001.jsonl and so on")
    upstream_key_env: str | None = Field(
        None, description="environment variable with a key or user:password"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8800, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    sample: float = Field(1.0, ge=0, le=1, description="share of requests to record, 0 to 1")
    max_body: Size = Field("8M", description="larger bodies are served, not recorded")
    max_file: Size = Field("256M", description="size at which the next file begins")
    max_total: Size = Field("10G", description="size of all files at which recording stops")
    connect_timeout: float = Field(10.0, gt=0, description="seconds to wait for a connection")
    drain: int = Field(30, ge=0, description="seconds that answers may go on at the end")


class Record(Config):
    """A line of `specdec collect proxy`."""

    id: str = Field(description="random name of the record")
    time: str = Field(description="when the request came, ISO 8601 in UTC")
    path: str = Field(description="endpoint, without what stands before /v1")
    model: str | None = Field(description="model asked for, else the one that answered")
    request: dict[Any, Any] = Field(
        description="model, messages, prompt, sampling and tools; secrets are [redacted]"
    )
    response: dict[Any, Any] | None = Field(
        description="choices, usage and error, of a stream as without one; null for no JSON object"
    )
    status: int | None = Field(description="HTTP status; null without an answer")
    complete: bool = Field(
        description="false if the client left, or the upstream broke off or sent an error"
    )
    stream: bool = Field(description="whether the answer was an event stream")
    latency_s: float = Field(
        ge=0, description="seconds from the request's head to the end of the answer"
    )
    ttft_s: float | None = Field(
        ge=0, description="seconds from the request's head to the first text of a stream"
    )


class TotalReachedError(Exception):
    """The folder holds as much as it may."""


class RecordFiles:
    """`requests-00001.jsonl` and so on, of one process and one thread at a time."""

    def __init__(self, folder: Path, max_file_bytes: int, max_total_bytes: int) -> None:
        self._folder, self._max_file, self._max_total = folder, max_file_bytes, max_total_bytes
        self._lock = LineFile(folder / ".lock", private=True)
        self._number = max(self._sizes(), default=1)
        self._file: LineFile | None = LineFile(self.path, private=True)
        self.total_bytes = sum(self._sizes().values())

    @property
    def path(self) -> Path:
        """The file that the next line goes to, unless it is full."""
        return self._folder / f"requests-{self._number:05d}.jsonl"

    def append(self, line: bytes) -> None:
        """Add a line; when this returns it is on the disk."""
        if self.total_bytes + len(line) > self._max_total:
            self.total_bytes = sum(self._sizes().values())  # somebody may have taken files away
            if self.total_bytes + len(line) > self._max_total:
                raise TotalReachedError
        try:
            self._file_for(len(line)).write(line, durable=True)
        except OSError:
            self._close_file()  # opening it again heals what is torn
            raise
        self.total_bytes += len(line)

    def close(self) -> None:
        self._close_file()
        self._lock.close()

    def _file_for(self, num_bytes: int) -> LineFile:
        while True:
            if self._file is None:
                os.stat(self._folder)  # one that was removed is not made again
                self._file = LineFile(self.path, private=True)
            size = self._file.num_bytes
            is_full = size and size + num_bytes > self._max_file
            # Lines would go with a file that somebody has moved away.
            if self._file.is_in_place and not is_full:
                return self._file
            self._close_file()
            self._number = max([self._number, *self._sizes()]) + 1

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _sizes(self) -> dict[int, int]:
        """Map the number of each file to its bytes."""
        found = ((_NAME.fullmatch(entry.name), entry) for entry in os.scandir(self._folder))
        return {int(n[1]): each.stat(follow_symlinks=False).st_size for n, each in found if n}
