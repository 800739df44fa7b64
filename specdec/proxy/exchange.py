"""A request and its answer, kept while they pass until they are recorded or given up."""

import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from specdec.proxy.redaction import secrets_outside
from specdec.proxy.streams import Answer, Inflater, JoinedAnswer, PlainAnswer

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1, with "proxy-connection", which clients still send.
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
_READABLE = {b"gzip", b"x-gzip", b"deflate", b"identity"}


def end_to_end(headers: Headers) -> Headers:
    """Headers without those of this hop, names in lower case, order and repetitions kept.

    A length beside a transfer coding is dropped too: only one of them can be true.
    """
    lower = [(name.lower(), value) for name, value in headers]
    dropped = set(_HOP_BY_HOP)
    for name, value in lower:
        if name == b"connection":
            dropped.update(option.strip().lower() for option in value.split(b","))
        elif name == b"transfer-encoding":
            dropped.add(b"content-length")
    return [(name, value) for name, value in lower if name not in dropped]


def readable_codings(headers: Headers) -> Headers:
    """Headers that accept only codings of the answer that the recorder can undo."""
    return [
        (name, _readable(value) if name == b"accept-encoding" else value) for name, value in headers
    ]


def _readable(accepted: bytes) -> bytes:
    items = [item.strip() for item in accepted.split(b",")]
    kept = [item for item in items if item.split(b";")[0].strip().lower() in _READABLE]
    return b", ".join(kept) or b"identity"


def header(headers: Headers, name: bytes) -> str:
    """The first value of a header, in lower case; empty if there is none."""
    return next((value for key, value in headers if key == name), b"").decode("latin-1").lower()


class Skip(StrEnum):
    """Reasons, in the words of `/health`."""

    NOT_SAMPLED = "not sampled"
    REQUEST_TOO_LARGE = "request too large"
    ANSWER_TOO_LARGE = "answer too large"
    MEMORY = "too much in flight"
    CONTENT_CODING = "unknown content coding"
    NOT_JSON = "request is no JSON object"
    NO_REQUEST = "client left before it had asked"
    NO_ANSWER = "no answer from upstream"
    MAX_TOTAL = "--max-total reached"
    DISK = "disk cannot be written"
    FAULT = "fault of the recorder"


@dataclass
class Budget:
    """Memory that all exchanges share, and what became of them that are not recorded."""

    max_body_bytes: int
    max_held_bytes: int
    held_bytes: int = 0
    skipped: Counter[Skip] = field(default_factory=Counter)


class Exchange:
    """One request on its way to a record.

    Attributes:
        is_open: whether it still takes what passes: it is neither sealed nor given up.
        status: of the answer; None until there is one.
        ended: whether the answer came to its regular end.
    """

    def __init__(self, path: str, headers: Headers, query: bytes, budget: Budget) -> None:
        self.id = uuid.uuid4().hex
        self.time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.path = path
        self.secrets = secrets_outside(headers, query)
        self.request = bytearray()
        self.answer: Answer | None = None
        self.status: int | None = None
        self.is_stream = False
        self.ended = False
        self.ttft_s: float | None = None
        self.latency_s = 0.0
        self.is_open = True
        self._started = time.perf_counter()
        self._inflater: Inflater | None = None
        self._bytes_left: int | None = None
        self._held = 0
        self._budget = budget

    @property
    def has_answer(self) -> bool:
        """Whether all of the answer is here, though its end may still have to pass."""
        return self.answer is not None and (self.answer.has_ended or self._bytes_left == 0)

    def add_request(self, piece: bytes) -> None:
        """Keep a part of the request's body."""
        if self.is_open:
            self.request += piece
            if len(self.request) > self._budget.max_body_bytes:
                self.skip(Skip.REQUEST_TOO_LARGE)
            self._hold()

    def start_answer(self, status: int, headers: Headers) -> None:
        """The answer's head has come."""
        self.status = status
        if not self.is_open:
            return
        self.secrets |= secrets_outside(headers, b"", named_only=True)
        self.is_stream = header(headers, b"content-type").startswith("text/event-stream")
        self.answer = JoinedAnswer() if self.is_stream else PlainAnswer()
        length = header(headers, b"content-length")
        self._bytes_left = int(length) if length.isdecimal() else None
        try:
            self._inflater = Inflater(header(headers, b"content-encoding"))
        except ValueError:
            self.skip(Skip.CONTENT_CODING)

    def add_answer(self, piece: bytes) -> None:
        """Keep what a record needs of a part of the answer's body, as it came over the wire."""
        if not self.is_open or self.answer is None or self._inflater is None:
            return
        if self._bytes_left is not None:
            self._bytes_left -= len(piece)
        try:
            for plain in self._inflater.feed(piece):
                self.answer.feed(plain)
                if self.answer.size > self._budget.max_body_bytes:
                    self.skip(Skip.ANSWER_TOO_LARGE)
                    return
        except ValueError:  # damaged: the request is worth a record all the same
            self._inflater = None
        if self.ttft_s is None and self.answer.has_text:
            self.ttft_s = self._elapsed()
        self._hold()

    def seal(self) -> None:
        """What it holds now is what is recorded."""
        self.is_open = False
        self.latency_s = self._elapsed()

    def skip(self, reason: Skip) -> None:
        """Give it up; only the count of such remains."""
        if self.is_open:
            self._budget.skipped[reason] += 1
            self.release()

    def release(self) -> None:
        """Give back its memory; nothing of it is kept from here on."""
        self.is_open = False
        self.request, self.answer, self._inflater = bytearray(), None, None
        self._budget.held_bytes -= self._held
        self._held = 0

    def _hold(self) -> None:
        if not self.is_open:
            return
        size = len(self.request) + (self.answer.size if self.answer else 0)
        self._budget.held_bytes += size - self._held
        self._held = size
        if self._budget.held_bytes > self._budget.max_held_bytes:
            self.skip(Skip.MEMORY)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started


MIB = 1024**2
_UNITS = {"": 1, "k": 1024, "m": MIB, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Settings:
    """Settings of a recording.

    Attributes:
        out: folder of the records; made if it is not there.
        sample: share of the requests that is recorded, from 0 to 1.
        max_body_bytes: larger requests, and larger answers, are served but not recorded.
        max_file_bytes: a file that would grow beyond it is followed by the next one.
        max_total_bytes: of all files in `out`; recording stops there, serving does not.
        max_held_bytes: memory for all requests and answers that are not written yet.
        max_wait_s: longest that the end of an answer waits for its record to reach the disk.

    Raises:
        ValueError: a share outside 0 to 1, or a size below one byte.
    """

    out: Path
    sample: float = 1.0
    max_body_bytes: int = 8 * MIB
    max_file_bytes: int = 256 * MIB
    max_total_bytes: int = 10 * 1024 * MIB
    max_held_bytes: int = 256 * MIB
    max_wait_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.sample <= 1:
            raise ValueError(
                f"--sample {self.sample} is no share; give 0 (nothing) to 1 (every request)"
            )
        for name in ("max_body_bytes", "max_file_bytes", "max_total_bytes", "max_held_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")


def parse_size(text: str) -> int:
    """Bytes from "4096", "512K", "8M", "256MiB" or "1.5G"; units are powers of 1024.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no size; give bytes or a unit, as 8M, 256MiB or 1.5G")
    return int(float(found[1]) * _UNITS[found[2]])
