"""A streamed answer, joined to the response that the same request without a stream would give."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from typing import Any, Protocol


class EventStream:
    """Takes an event stream apart; only the data of events is kept.

    Source: WHATWG HTML, "Server-sent events", with lines that end in LF or CR LF.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._data: list[str] = []
        self.size = 0  # bytes of what is kept for an event that is not whole yet

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of every event that this piece completes."""
        head, newline, tail = piece.rpartition(b"\n")
        self.size += len(piece)
        if not newline:
            self._rest.append(piece)
            return
        lines = b"".join([*self._rest, head]).split(b"\n")
        self._rest = [tail]
        for line in lines:
            yield from self._take(line)
        self.size = len(tail) + sum(map(len, self._data))

    def finish(self) -> Iterator[str]:
        """The data of an event whose end the stream did not mark."""
        yield from self._take(b"".join(self._rest))
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[str]:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
        elif not line and self._data:
            yield "\n".join(self._data)
            self._data = []


_KEPT = ("id", "created", "model", "system_fingerprint", "usage", "timings", "error")
_ENTRY = 512  # bytes of memory, about, that a choice, a field or a tool call costs beside its text


class JoinedAnswer:
    """An event stream, joined while it passes: only its text is kept, never its events.

    Every text field of the deltas is joined (content, reasoning, refusal, arguments of tool
    calls); log probabilities are not kept.
    """

    def __init__(self) -> None:
        self._events = EventStream()
        self._meter = _Meter()
        self._choices: dict[int, _Choice] = {}
        self._top: dict[str, Any] = {}
        self._is_damaged = False
        self.has_ended = False

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory, about."""
        return self._events.size + self._meter.text_bytes + self._meter.entries * _ENTRY

    @property
    def has_text(self) -> bool:
        """Whether the model has said something."""
        return self._meter.text_bytes > 0

    def feed(self, piece: bytes) -> None:
        """Take the next bytes, their content coding undone."""
        for data in self._events.feed(piece):
            self._take(data)

    def response(self) -> tuple[dict[str, Any] | None, bool]:
        """The joined response, and whether it is whole.

        It is if the stream said `[DONE]` or gave every choice's finish reason, with no error and
        no event that could not be read.
        """
        for data in self._events.finish():
            self._take(data)
        choices = [self._choices[index].joined(index) for index in sorted(self._choices)]
        if not choices and not self._top:
            return None, False
        is_chat = any(choice.is_chat for choice in self._choices.values())
        kind = "chat.completion" if is_chat else "text_completion"
        finished = bool(choices) and all(choice["finish_reason"] for choice in choices)
        is_whole = (self.has_ended or finished) and not self._is_damaged
        return {**self._top, "object": kind, "choices": choices}, is_whole

    def _take(self, data: str) -> None:
        if data.strip() == "[DONE]":
            self.has_ended = True
            return
        try:
            self._add(json.loads(data))
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._is_damaged = True  # the rest of the stream may still be of use

    def _add(self, event: dict[str, Any]) -> None:
        self._top.update({key: event[key] for key in _KEPT if event.get(key) is not None})
        self._is_damaged = self._is_damaged or "error" in self._top
        for chunk in event.get("choices") or []:
            index = int(chunk.get("index", 0))
            if index not in self._choices:
                self._choices[index] = _Choice(self._meter)
            self._choices[index].add(chunk)


@dataclass
class _Meter:
    """What an answer keeps in memory."""

    text_bytes: int = 0
    entries: int = 0


class _Fields:
    """Fields of a message: text grows, and what is said once stays as it was said first."""

    def __init__(self, meter: _Meter, once: tuple[str, ...]) -> None:
        self._meter = meter
        self._once = once
        self._said: dict[str, str] = {}
        self._texts: dict[str, StringIO] = {}

    def add(self, delta: dict[str, Any]) -> None:
        """Take the strings of a delta."""
        for name, value in delta.items():
            if isinstance(value, str) and name in self._once:
                if value:
                    self._said.setdefault(name, value)
            elif isinstance(value, str):
                self._grow(name, value)

    def _grow(self, name: str, text: str) -> None:
        if name not in self._texts:
            self._texts[name] = StringIO()
            self._meter.entries += 1
        self._texts[name].write(text)
        self._meter.text_bytes += len(text.encode("utf-8", "surrogatepass"))

    def joined(self) -> dict[str, Any]:
        """All fields with their text."""
        return self._said | {name: text.getvalue() for name, text in self._texts.items()}


class _Choice:
    """One of a response's choices, of a chat or of a completion."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        meter.entries += 1
        self._fields = _Fields(meter, once=("role",))
        self._calls: dict[int, tuple[_Fields, _Fields]] = {}
        self._reasons: dict[str, Any] = {"finish_reason": None}
        self.is_chat = False

    def add(self, chunk: dict[str, Any]) -> None:
        """Take one chunk of this choice."""
        for name in ("finish_reason", "stop_reason"):
            if chunk.get(name) is not None:
                self._reasons[name] = chunk[name]
        delta = chunk.get("delta")
        if delta is None:
            self._fields.add({"text": chunk.get("text")})
            return
        self.is_chat = True
        self._fields.add(delta)
        for position, call in enumerate(delta.get("tool_calls") or []):
            self._add_call(int(call.get("index", position)), call)

    def _add_call(self, index: int, call: dict[str, Any]) -> None:
        if index not in self._calls:
            self._meter.entries += 1
            outer = _Fields(self._meter, once=("id", "type"))
            self._calls[index] = (outer, _Fields(self._meter, once=("name",)))
        outer, function = self._calls[index]
        outer.add(call)
        function.add(call.get("function") or {})

    def joined(self, index: int) -> dict[str, Any]:
        """The choice as a response without a stream has it."""
        fields = self._fields.joined()
        if not self.is_chat:
            return {"index": index, **fields, **self._reasons}
        message = {"role": "assistant", "content": None, **fields}
        if self._calls:
            calls = (self._calls[key] for key in sorted(self._calls))
            message["tool_calls"] = [
                {**outer.joined(), "function": function.joined()} for outer, function in calls
            ]
        return {"index": index, "message": message, **self._reasons}


class Answer(Protocol):
    """An answer that grows with the bytes that pass."""

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory, about."""

    @property
    def has_ended(self) -> bool:
        """Whether the answer itself says that nothing more comes."""

    @property
    def has_text(self) -> bool:
        """Whether the model has said something."""

    def feed(self, piece: bytes) -> None:
        """Take the next bytes, their content coding undone."""

    def response(self) -> tuple[dict[str, Any] | None, bool]:
        """The answer as OpenAI's response object, and whether it is whole."""


class PlainAnswer:
    """An answer that is one JSON object."""

    has_ended = False
    has_text = False

    def __init__(self) -> None:
        self._body = bytearray()

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory."""
        return len(self._body)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes, their content coding undone."""
        self._body += piece

    def response(self) -> tuple[dict[str, Any] | None, bool]:
        """The object, and True; None and False for anything else."""
        try:
            found = json.loads(self._body)
        except (ValueError, RecursionError):
            return None, False
        return (found, True) if isinstance(found, dict) else (None, False)


_PIECE = 65536


class Inflater:
    """gzip or deflate (RFC 9110, section 8.4.1), as much at a time as arrives.

    Raises:
        ValueError: the coding is another one.
    """

    def __init__(self, coding: str) -> None:
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ValueError(f"content coding {coding!r} cannot be read")
        # 32 more than the window's size: zlib finds out by itself which of the two headers it is.
        self._zlib = None if coding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes stand for, in pieces of at most 64 KiB where they were compressed.

        Raises:
            ValueError: the bytes are damaged.
        """
        if self._zlib is None:
            yield data
            return
        try:
            piece = self._zlib.decompress(data, _PIECE)
            yield piece
            while len(piece) == _PIECE:
                piece = self._zlib.decompress(self._zlib.unconsumed_tail, _PIECE)
                yield piece
        except zlib.error as error:
            raise ValueError(f"the answer's compressed bytes are damaged: {error}") from error
