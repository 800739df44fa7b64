"""A request and its answer, kept while they pass until they are recorded or given up."""

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from specdec.proxy.answer import Answer, PlainAnswer
from specdec.proxy.content_coding import Inflater
from specdec.proxy.headers import Headers, header
from specdec.proxy.joined_answer import JoinedAnswer
from specdec.proxy.redaction import secrets_outside
from specdec.proxy.skip import Skip


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
