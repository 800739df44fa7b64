"""Exchanges on their way to the disk, without ever delaying the server for long."""

import asyncio
import json
import random
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import httpx

from specdec.common.metrics import Metrics
from specdec.proxy.records import ProxyConfig, Record, RecordFiles, TotalReachedError, parse_size
from specdec.proxy.redaction import keep, redact, secrets_inside, secrets_outside

Headers = list[tuple[bytes, bytes]]
Say = Callable[[str], None]

_PIECE = 65536
_TOP_FIELDS = (
    *("id", "created", "model", "system_fingerprint", "usage", "timings", "error"),
    "prompt_token_ids",
)
_FACTS = ("finish_reason", "stop_reason", "prompt_token_ids")  # of a choice, said once
_SAID_ONCE = ("role", "id", "type", "name")  # other texts of a delta grow


def parse_object(body: bytes | bytearray) -> dict[str, Any] | None:
    """Return the JSON object in a body; None for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Answer:
    """The body of an answer while it passes: decompressed, and a stream's events joined.

    Of a stream its text fields and token ids are kept, and never its events.
    """

    def __init__(self, headers: httpx.Headers) -> None:
        self.is_stream = headers.get("content-type", "").lower().startswith("text/event-stream")
        self.has_ended = self.has_text = False  # the stream said `[DONE]`; the model a text
        coding = headers.get("content-encoding", "").lower()
        self.is_readable = coding in ("", "identity", "gzip", "x-gzip", "deflate")
        # 32 more than the window's size: zlib finds out by itself which of the two headers it is.
        self._zlib = None if coding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._rest = bytearray()  # the body, or of a stream its last line
        self._data = bytearray()  # of an event that is not whole yet
        self._top: dict[str, Any] = {}
        self._choices: dict[int, tuple[dict[str, Any], dict[Any, Any]]] = {}  # facts, texts
        self._joined_bytes = 0
        self._is_chat = self._is_damaged = False

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory, about."""
        return len(self._rest) + len(self._data) + self._joined_bytes

    def feed(self, received: bytes, max_bytes: int) -> bool:
        """Take the next bytes as they came over the wire; False if they are too many to keep."""
        try:
            for piece in self._inflated(received) if self.is_readable else ():
                self._rest += piece
                if self.is_stream and b"\n" in piece:
                    *lines, self._rest = self._rest.split(b"\n")
                    self._take_lines(lines)
                if self.size > max_bytes:
                    return False
        except zlib.error:  # damaged: the request is worth a record all the same
            self.is_readable = False
        return True

    def response(self) -> tuple[dict[str, Any] | None, bool]:
        """Return what the same request gives without a stream, and whether it is whole."""
        if not self.is_stream:
            found = parse_object(self._rest)
            return found, found is not None
        self._take_lines([self._rest, b""])  # an event whose end the stream did not mark
        if not self._choices and not self._top:
            return None, False
        choices: list[dict[str, Any]] = []
        for index, (facts, texts) in sorted(self._choices.items()):
            fields = _plain(texts)
            if self._is_chat:
                said = {"role": "assistant", "content": None, **fields.pop("delta", {})}
                fields = {"message": said}
            choices.append({"index": index, **fields, "finish_reason": None, **facts})
        finished = bool(choices) and all(choice["finish_reason"] for choice in choices)
        is_whole = (self.has_ended or finished) and not self._is_damaged
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._top, "object": kind, "choices": choices}, is_whole

    def _inflated(self, data: bytes) -> Iterator[bytes]:
        """Undo gzip or deflate (RFC 9110, section 8.4.1) in pieces of at most 64 KiB."""
        if self._zlib is None:
            yield data
            return
        piece = self._zlib.decompress(data, _PIECE)
        yield piece
        while len(piece) == _PIECE:
            piece = self._zlib.decompress(self._zlib.unconsumed_tail, _PIECE)
            yield piece

    def _take_lines(self, lines: Iterable[bytes | bytearray]) -> None:
        """Read server-sent events (WHATWG HTML), whose lines end in LF or CR LF."""
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data += line[5:].removeprefix(b" ") + b"\n"
            elif not line and self._data:
                self._take_event(self._data.decode("utf-8", "replace"))
                self._data.clear()

    def _take_event(self, data: str) -> None:
        if data.strip() == "[DONE]":
            self.has_ended = True
            return
        try:
            event = json.loads(data)
            if not isinstance(event, dict):  # llama.cpp begins some streams with null
                return
            self._top |= {key: event[key] for key in _TOP_FIELDS if event.get(key) is not None}
            for chunk in event.get("choices") or []:
                index = int(chunk.get("index", 0))
                facts, texts = self._entry(self._choices, index, lambda: ({}, {}))
                told = {name: chunk[name] for name in _FACTS if name in chunk}
                facts |= {name: each for name, each in told.items() if facts.get(name) is None}
                new = chunk.get("token_ids")
                if new is not None:
                    facts.setdefault("token_ids", []).extend(new)
                ids = (new, chunk.get("prompt_token_ids"), event.get("prompt_token_ids"))
                self._joined_bytes += 40 * sum(len(each or ()) for each in ids)
                self._is_chat = self._is_chat or "delta" in chunk
                self._join(texts, {key: chunk[key] for key in ("delta", "text") if key in chunk})
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._is_damaged = True  # the rest of the stream may still be of use
        self._is_damaged = self._is_damaged or "error" in self._top

    def _join(self, node: dict[Any, Any], delta: Any) -> None:
        """Add a delta's texts to those before; items of lists are told apart by their index."""
        pairs: Any = delta.items() if isinstance(delta, dict) else enumerate(delta)
        for key, each in pairs:
            if isinstance(delta, list) and isinstance(each, dict):
                key = int(each.get("index", key))
            is_once = key in _SAID_ONCE
            if isinstance(each, str) and not (is_once and (not each or key in node)):
                self._entry(node, key, StringIO).write(each)
                self._joined_bytes += len(each.encode("utf-8", "surrogatepass"))
                self.has_text = self.has_text or bool(each and not is_once)
            elif each and isinstance(each, dict | list):
                self._join(self._entry(node, key, dict), each)

    def _entry(self, node: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        if key not in node:
            node[key] = make()
            self._joined_bytes += 512  # what a field costs beside its text, about
        return node[key]


def _plain(node: Any) -> Any:
    """Make texts, and lists of mappings whose keys are places."""
    if isinstance(node, StringIO):
        return node.getvalue()
    parts = {key: _plain(each) for key, each in node.items()}
    found = {key: part for key, part in parts.items() if part != {}}  # of which nothing was said
    is_list = found and all(isinstance(key, int) for key in found)
    return [found[place] for place in sorted(found)] if is_list else found


class Exchange:
    """One request and its answer on their way to a record."""

    def __init__(self, recorder: "Recorder", path: str, headers: Headers, query: bytes) -> None:
        # Without its prefix, which may name a team or hold a key.
        endpoint = re.search(r"(/v1)?(/chat)?/completions/?$", path)
        self.record = Record(
            id=uuid.uuid4().hex,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            path=endpoint[0] if endpoint else "",
            model=None,
            request={},
            response=None,
            status=None,
            complete=False,
            stream=False,
            latency_s=0.0,
            ttft_s=None,
        )
        self.is_open, self.ended = True, False
        self._recorder, self._started = recorder, time.perf_counter()
        self._secrets = secrets_outside(headers, query)
        self._request, self._held = bytearray(), 0
        self._answer: Answer | None = None
        self._bytes_left: int | None = None

    @property
    def has_answer(self) -> bool:
        """True once all of the answer is here, though its end may still have to pass."""
        return self._answer is not None and (self._answer.has_ended or self._bytes_left == 0)

    def add_request(self, piece: bytes) -> None:
        if self.is_open:
            self._request += piece
            if len(self._request) > self._recorder.max_body_bytes:
                self.skip("request too large")
            self._hold()

    def start_answer(self, status: int, headers: httpx.Headers) -> None:
        if not self.is_open:
            return
        self._secrets |= secrets_outside(headers.raw, b"", named_only=True)
        length = headers.get("content-length", "")
        # A length beside a transfer coding says nothing.
        is_told = length.isdecimal() and "transfer-encoding" not in headers
        self._bytes_left = int(length) if is_told else None
        self._answer = Answer(headers)
        self.record.status, self.record.stream = status, self._answer.is_stream
        if not self._answer.is_readable:
            self.skip("unknown content coding")

    def add_answer(self, piece: bytes) -> None:
        if not self.is_open or self._answer is None:
            return
        if self._bytes_left is not None:
            self._bytes_left -= len(piece)
        if not self._answer.feed(piece, self._recorder.max_body_bytes):
            self.skip("answer too large")
        elif self.record.ttft_s is None and self._answer.has_text:
            self.record.ttft_s = self.elapsed()
        self._hold()

    def skip(self, reason: str) -> None:
        """Give it up; only the count of such remains."""
        if self.is_open:
            self._recorder.skipped[reason] += 1
            self.release()

    def release(self) -> None:
        """Give back its memory; nothing of it is kept from here on."""
        self.is_open = False
        self._request, self._answer = bytearray(), None
        self._recorder.held_bytes -= self._held
        self._held = 0

    def line(self, secrets: frozenset[str]) -> bytes | None:
        """Write its record as a line of ASCII; None if the request is no JSON object."""
        request = parse_object(self._request)
        if request is None:
            return None
        record, is_whole = self.record, False
        record.request = keep(request, "request")
        if self._answer:
            response, is_whole = self._answer.response()
            record.response = None if response is None else keep(response, "response")
        record.model = record.request.get("model") or (record.response or {}).get("model") or None
        record.complete = is_whole and (self.ended or self.has_answer)
        # Secrets of what is not kept, too: the answer may repeat them.
        inside = secrets_inside(request)
        found = (secrets | self._secrets | inside) - {record.model or ""}
        clean = redact(vars(record), found)
        # No pattern finds in ids what they spell: they stay where the text has been searched.
        is_clean = clean == vars(record) and not inside
        is_read = is_clean and record.request.get("prompt") == request.get("prompt")
        answer = clean["response"] or {}
        for part in (answer, *(answer.get("choices") or ())):
            for name, may_stay in (("token_ids", is_clean), ("prompt_token_ids", is_read)):
                if not may_stay:
                    part.pop(name, None)
        text = json.dumps(clean, allow_nan=False, separators=(",", ":"))
        return text.encode("ascii") + b"\n"

    def _hold(self) -> None:
        if self.is_open:
            size = len(self._request) + (self._answer.size if self._answer else 0)
            self._recorder.held_bytes += size - self._held
            self._held = size
            if self._recorder.held_bytes > self._recorder.max_held_bytes:
                self.skip("too much in flight")

    def elapsed(self) -> float:
        return round(time.perf_counter() - self._started, 6)


class Recorder:
    """Writes records in a thread of its own; its state changes in the event loop's alone."""

    observer: Metrics | None = None  # where it is set, hears of every record

    def __init__(
        self, config: ProxyConfig, files: RecordFiles, secrets: frozenset[str], say: Say
    ) -> None:
        self.files, self.chance, self.max_wait_s = files, random.Random(), 2.0
        self.max_body_bytes, self.max_held_bytes = parse_size(config.max_body), 256 * 1024**2
        self.held_bytes = self.recorded = 0  # memory of all exchanges; exchanges on the disk
        self.skipped: Counter[str] = Counter()  # those that are not recorded, by reason
        self.trouble = self.last_error = ""
        self._config, self._secrets, self._say = config, secrets, say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: dict[str, asyncio.Future[bool]] = {}

    def begin(self, method: str, path: str, headers: Headers, query: bytes) -> Exchange:
        """Make an exchange that is open if this request is to be recorded."""
        exchange = Exchange(self, path, headers, query)
        if method != "POST" or not exchange.record.path:
            exchange.release()
        elif self.chance.random() >= self._config.sample:
            exchange.skip("not sampled")
        return exchange

    async def keep(self, exchange: Exchange) -> None:
        """Record the exchange as it is now, once; wait for the disk, but not for ever."""
        if exchange.is_open:
            exchange.is_open = False  # it is recorded as it is now
            exchange.record.latency_s = exchange.elapsed()
            loop = asyncio.get_running_loop()
            writing = loop.run_in_executor(self._thread, self._write, exchange)
            self._pending[exchange.record.id] = writing
            writing.add_done_callback(lambda done: self._written(exchange, done))
        if exchange.record.id in self._pending:
            # A disk that hangs must not hang the client.
            await asyncio.wait([self._pending[exchange.record.id]], timeout=self.max_wait_s)

    async def close(self) -> None:
        """Write what is waiting, and give the folder free."""
        if self._pending:
            await asyncio.wait(list(self._pending.values()))
        self._thread.shutdown()
        self.files.close()

    def _write(self, exchange: Exchange) -> bool:
        line = exchange.line(self._secrets)
        if line is not None:
            self.files.append(line)
        return line is not None

    def _written(self, exchange: Exchange, done: "asyncio.Future[bool]") -> None:
        del self._pending[exchange.record.id]
        exchange.release()
        error = done.exception()
        if isinstance(error, TotalReachedError):
            self._stop("--max-total reached", f"{self._config.max_total} are on the disk")
        elif isinstance(error, OSError):
            # The system's words: files' own advise to give the command again, which nobody has to.
            self._stop("disk cannot be written", str(error.__cause__ or error))
        elif error is not None:
            # Whatever a request may hold, it is served; a fault in recording it is counted.
            self.skipped["fault of the recorder"] += 1
            # Without its text, which may quote the request.
            self._note(f"a request could not be recorded: {type(error).__name__}")
        elif not done.result():
            self.skipped["request is no JSON object"] += 1
        else:
            self.recorded += 1
            if self.observer:
                self.observer.observe_exchange(exchange.record)
            if self.trouble:
                self.trouble = ""
                self._say("recording goes on")

    def _stop(self, reason: str, detail: str) -> None:
        self.skipped[reason] += 1
        if self.trouble != f"{reason}: {detail}":
            self.trouble = f"{reason}: {detail}"
            self._note(f"recording stopped ({self.trouble}); requests are served all the same")

    def _note(self, text: str) -> None:
        self.last_error = text
        self._say(text)
