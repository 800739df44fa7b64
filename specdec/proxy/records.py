"""Records, and the files that hold one in each line."""

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from specdec.common.config import Config
from specdec.common.files import LineFile
from specdec.proxy.redaction import redact


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
        ge=0,
        description="seconds from the request's head to the first text of a stream",
    )


def encode(record: Record, secrets: frozenset[str]) -> bytes:
    """One line of JSON in ASCII with its line end, without the secrets and their like."""
    clean = redact(vars(record), secrets)
    return json.dumps(clean, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def is_recorded(path: str) -> bool:
    """Tell the path of chat completions or of completions, with or without a prefix."""
    return path.rstrip("/").endswith("/completions")


def endpoint(path: str) -> str:
    """The path without its prefix, which may name a team or hold a key."""
    found = re.search(r"(/v1)?(/chat)?/completions/?$", path)
    return found[0] if found else ""


_NAME = re.compile(r"requests-(\d{5,})\.jsonl")


class TotalReachedError(Exception):
    """The folder holds as much as it may."""


class RecordFiles:
    """`requests-00001.jsonl` and so on; a line that `append` returned for is on the disk.

    Not for several threads at once. One process at a time holds the folder.
    """

    def __init__(self, folder: Path, max_file_bytes: int, max_total_bytes: int) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._lock = LineFile(folder / ".lock", private=True)
        self._number = max(self._numbers(), default=1)
        self._file: LineFile | None = LineFile(self.path, private=True)
        self.total_bytes = self._count_total()

    @property
    def path(self) -> Path:
        """The file that the next line goes to, unless it is full."""
        return self._folder / f"requests-{self._number:05d}.jsonl"

    def append(self, line: bytes) -> None:
        """Write a whole line, and return when it is on the disk."""
        if self.total_bytes + len(line) > self._max_total_bytes:
            self.total_bytes = self._count_total()  # somebody may have taken files away
            if self.total_bytes + len(line) > self._max_total_bytes:
                raise TotalReachedError
        try:
            self._file_for(len(line)).write(line, durable=True)
        except OSError:
            self._close_file()  # opening it again heals what is torn
            raise
        self.total_bytes += len(line)

    def close(self) -> None:
        """Give the folder free."""
        self._close_file()
        self._lock.close()

    def _file_for(self, num_bytes: int) -> LineFile:
        while True:
            if self._file is None:
                os.stat(self._folder)  # one that was removed is not made again
                self._file = LineFile(self.path, private=True)
            size = self._file.num_bytes
            is_full = size and size + num_bytes > self._max_file_bytes
            # Lines would go with a file that somebody has moved away.
            if self._file.is_in_place and not is_full:
                return self._file
            self._close_file()
            self._number = max([self._number, *self._numbers()]) + 1

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(entry.name) for entry in self._folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _count_total(self) -> int:
        return sum(
            entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(self._folder)
            if _NAME.fullmatch(entry.name)
        )
