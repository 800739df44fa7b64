"""Write exchanges to the disk without ever delaying the server for long."""

import asyncio
import random
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx

from specdec.proxy.allowed import REQUEST, RESPONSE, keep
from specdec.proxy.config import ProxyConfig, parse_size
from specdec.proxy.records import (
    Record,
    RecordFiles,
    TotalReachedError,
    encode,
    endpoint,
    is_recorded,
)
from specdec.proxy.redaction import secrets_inside, secrets_outside
from specdec.proxy.streams import Inflater, JoinedAnswer, PlainAnswer, parse_object

Headers = list[tuple[bytes, bytes]]
Say = Callable[[str], None]


@dataclass
class Budget:
    """Memory that all exchanges share, and counts of those that are not recorded, by reason."""

    max_body_bytes: int
    max_held_bytes: int
    held_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Exchange:
    """One request and its answer on their way to a record."""

    def __init__(self, path: str, headers: Headers, query: bytes, budget: Budget) -> None:
        self.id = uuid.uuid4().hex
        self.is_open = True
        self.ended = False
        self._time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._path = path
        self._secrets = secrets_outside(headers, query)
        self._request = bytearray()
        self._answer: JoinedAnswer | PlainAnswer | None = None
        self._status: int | None = None
        self._ttft_s: float | None = None
        self._latency_s = 0.0
        self._started = time.perf_counter()
        self._inflater: Inflater | None = None
        self._bytes_left: int | None = None
        self._held = 0
        self._budget = budget

    @property
    def has_answer(self) -> bool:
        """True once all of the answer is here, though its end may still have to pass."""
        return self._answer is not None and (self._answer.has_ended or self._bytes_left == 0)

    def add_request(self, piece: bytes) -> None:
        """Keep a part of the request's body."""
        if self.is_open:
            self._request += piece
            if len(self._request) > self._budget.max_body_bytes:
                self.skip("request too large")
            self._hold()

    def start_answer(self, status: int, headers: httpx.Headers) -> None:
        """Take the answer's head."""
        if not self.is_open:
            return
        self._status = status
        self._secrets |= secrets_outside(headers.raw, b"", named_only=True)
        is_stream = headers.get("content-type", "").lower().startswith("text/event-stream")
        self._answer = JoinedAnswer() if is_stream else PlainAnswer()
        length = headers.get("content-length", "")
        # A length beside a transfer coding says nothing.
        is_told = length.isdecimal() and "transfer-encoding" not in headers
        self._bytes_left = int(length) if is_told else None
        try:
            self._inflater = Inflater(headers.get("content-encoding", "").lower())
        except ValueError:
            self.skip("unknown content coding")

    def add_answer(self, piece: bytes) -> None:
        """Keep what a record needs of a part of the answer's body, as it came over the wire."""
        if not self.is_open or self._answer is None or self._inflater is None:
            return
        if self._bytes_left is not None:
            self._bytes_left -= len(piece)
        try:
            for plain in self._inflater.feed(piece):
                self._answer.feed(plain)
                if self._answer.size > self._budget.max_body_bytes:
                    self.skip("answer too large")
                    return
        except zlib.error:  # damaged: the request is worth a record all the same
            self._inflater = None
        if self._ttft_s is None and self._answer.has_text:
            self._ttft_s = self._elapsed()
        self._hold()

    def seal(self) -> None:
        """Take no more: it is recorded as it is now."""
        self.is_open = False
        self._latency_s = self._elapsed()

    def skip(self, reason: str) -> None:
        """Give it up; only the count of such remains."""
        if self.is_open:
            self._budget.skipped[reason] += 1
            self.release()

    def release(self) -> None:
        """Give back its memory; nothing of it is kept from here on."""
        self.is_open = False
        self._request, self._answer, self._inflater = bytearray(), None, None
        self._budget.held_bytes -= self._held
        self._held = 0

    def line(self, secrets: frozenset[str]) -> bytes | None:
        """The line of its record; None if the request is no JSON object."""
        request = parse_object(self._request)
        if request is None:
            return None
        response, is_whole = self._answer.response() if self._answer else (None, False)
        named = (request.get("model"), (response or {}).get("model"))
        model = next((name for name in named if isinstance(name, str) and name), None)
        record = Record(
            id=self.id,
            time=self._time,
            path=endpoint(self._path),
            model=model,
            request=keep(request, REQUEST),
            response=None if response is None else keep(response, RESPONSE),
            status=self._status,
            complete=is_whole and (self.ended or self.has_answer),
            stream=isinstance(self._answer, JoinedAnswer),
            latency_s=round(self._latency_s, 6),
            ttft_s=None if self._ttft_s is None else round(self._ttft_s, 6),
        )
        # Secrets of what is not kept, too: the answer may repeat them.
        return encode(record, (secrets | self._secrets | secrets_inside(request)) - {model or ""})

    def _hold(self) -> None:
        if not self.is_open:
            return
        size = len(self._request) + (self._answer.size if self._answer else 0)
        self._budget.held_bytes += size - self._held
        self._held = size
        if self._budget.held_bytes > self._budget.max_held_bytes:
            self.skip("too much in flight")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started


class Recorder:
    """Writes one record after the other in a thread of its own.

    Its state changes in the event loop's thread alone.
    """

    def __init__(
        self,
        config: ProxyConfig,
        files: RecordFiles,
        secrets: frozenset[str],
        say: Say,
        chance: random.Random | None = None,
        max_held_bytes: int = 256 * 1024**2,
        max_wait_s: float = 2.0,
    ) -> None:
        self.files = files
        self.budget = Budget(parse_size(config.max_body), max_held_bytes)
        self.recorded = 0
        self.trouble = ""
        self.last_error = ""
        self._config = config
        self._max_wait_s = max_wait_s
        self._secrets = secrets
        self._say = say
        self._chance = chance or random.Random()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: dict[str, asyncio.Future[bool]] = {}

    def begin(self, method: str, path: str, headers: Headers, query: bytes) -> Exchange:
        """Make an exchange that is open if this request is to be recorded."""
        exchange = Exchange(path, headers, query, self.budget)
        if method != "POST" or not is_recorded(path):
            exchange.release()
        elif self._chance.random() >= self._config.sample:
            exchange.skip("not sampled")
        return exchange

    async def keep(self, exchange: Exchange) -> None:
        """Record the exchange as it is now, once; wait for the disk, but not for ever."""
        if exchange.is_open:
            exchange.seal()
            writing = asyncio.get_running_loop().run_in_executor(
                self._thread, self._write, exchange
            )
            self._pending[exchange.id] = writing
            writing.add_done_callback(lambda done: self._written(exchange, done))
        if exchange.id in self._pending:
            # A disk that hangs must not hang the client.
            await asyncio.wait([self._pending[exchange.id]], timeout=self._max_wait_s)

    async def close(self) -> None:
        """Write what is waiting, and give the folder free."""
        if self._pending:
            await asyncio.wait(list(self._pending.values()))
        self._thread.shutdown()
        self.files.close()

    def _write(self, exchange: Exchange) -> bool:
        """Do in the recorder's thread what takes time; False if there is nothing to record."""
        line = exchange.line(self._secrets)
        if line is not None:
            self.files.append(line)
        return line is not None

    def _written(self, exchange: Exchange, done: "asyncio.Future[bool]") -> None:
        del self._pending[exchange.id]
        exchange.release()
        error = done.exception()
        if isinstance(error, TotalReachedError):
            self._stop("--max-total reached", f"{self._config.max_total} are on the disk")
        elif isinstance(error, OSError):
            # The system's words: files' own advise to give the command again, which nobody has to.
            self._stop("disk cannot be written", str(error.__cause__ or error))
        elif error is not None:
            # Whatever a request may hold, it is served; a fault in recording it is counted.
            self.budget.skipped["fault of the recorder"] += 1
            # Without its text, which may quote the request.
            self._note(f"a request could not be recorded: {type(error).__name__}")
        elif not done.result():
            self.budget.skipped["request is no JSON object"] += 1
        else:
            self.recorded += 1
            if self.trouble:
                self.trouble = ""
                self._say("recording goes on")

    def _stop(self, reason: str, detail: str) -> None:
        self.budget.skipped[reason] += 1
        if self.trouble != f"{reason}: {detail}":
            self.trouble = f"{reason}: {detail}"
            self._note(f"recording stopped ({self.trouble}); requests are served all the same")

    def _note(self, text: str) -> None:
        self.last_error = text
        self._say(text)
