"""Answers while they pass: decompressed, taken apart into events, and joined to one response."""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from io import StringIO
from typing import Any

_PIECE = 65536
_ENTRY = 512  # bytes of memory, about, that a field costs beside its text
_TOP_FIELDS = ("id", "created", "model", "system_fingerprint", "usage", "timings", "error")
_REASONS = ("finish_reason", "stop_reason")
_SAID_ONCE = ("role", "id", "type", "name")  # other texts of a delta grow

Response = tuple[dict[str, Any] | None, bool]


class Inflater:
    """Undoes gzip or deflate (RFC 9110, section 8.4.1), as much at a time as arrives."""

    def __init__(self, coding: str) -> None:
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ValueError(f"content coding {coding!r} cannot be read")
        # 32 more than the window's size: zlib finds out by itself which of the two headers it is.
        self._zlib = None if coding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress bytes into pieces of at most 64 KiB; `zlib.error` if they are damaged."""
        if self._zlib is None:
            yield data
            return
        piece = self._zlib.decompress(data, _PIECE)
        yield piece
        while len(piece) == _PIECE:
            piece = self._zlib.decompress(self._zlib.unconsumed_tail, _PIECE)
            yield piece


def parse_object(body: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON object in a body; None for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class PlainAnswer:
    """An answer that is one JSON object; its members are those of `JoinedAnswer`."""

    has_ended = has_text = False

    def __init__(self) -> None:
        self._body = bytearray()

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory."""
        return len(self._body)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        self._body += piece

    def response(self) -> Response:
        """The object, and True; None and False for anything else."""
        found = parse_object(self._body)
        return found, found is not None


class JoinedAnswer:
    """An event stream, joined while it passes: only its text is kept, never its events.

    Every text field of the deltas is joined (content, reasoning, refusal, arguments of tool
    calls); log probabilities are not kept.

    Attributes:
        has_ended: the stream said `[DONE]`.
        has_text: the model has said something.
    """

    def __init__(self) -> None:
        self.has_ended = self.has_text = False
        self._events = _Events()
        self._top: dict[str, Any] = {}
        self._reasons: dict[int, dict[str, Any]] = {}  # of every choice
        self._texts: defaultdict[tuple[Any, ...], StringIO] = defaultdict(StringIO)  # by path
        self._text_bytes = 0
        self._is_chat = self._is_damaged = False

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory, about."""
        entries = len(self._texts) + len(self._reasons)
        return self._events.size + self._text_bytes + entries * _ENTRY

    def feed(self, piece: bytes) -> None:
        """Take the next bytes, their content coding undone."""
        for data in self._events.feed(piece):
            self._take(data)

    def response(self) -> Response:
        """The response that the same request without a stream would give, and whether it is whole.

        It is if the stream said `[DONE]` or gave every choice's finish reason, with no error and
        no event that could not be read.
        """
        for data in self._events.finish():
            self._take(data)
        if not self._reasons and not self._top:
            return None, False
        texts = _nested({path: text.getvalue() for path, text in self._texts.items()})
        choices: list[dict[str, Any]] = []
        for index, reasons in sorted(self._reasons.items()):
            fields = texts.get(index, {})
            if self._is_chat:
                fields = {"message": {"role": "assistant", "content": None, **fields}}
            choices.append({"index": index, **fields, **reasons})
        finished = bool(choices) and all(choice["finish_reason"] for choice in choices)
        is_whole = (self.has_ended or finished) and not self._is_damaged
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._top, "object": kind, "choices": choices}, is_whole

    def _take(self, data: str) -> None:
        if data.strip() == "[DONE]":
            self.has_ended = True
            return
        try:
            event = json.loads(data)
            self._top |= {key: event[key] for key in _TOP_FIELDS if event.get(key) is not None}
            for chunk in event.get("choices") or []:
                self._add(chunk)
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._is_damaged = True  # the rest of the stream may still be of use
        self._is_damaged = self._is_damaged or "error" in self._top

    def _add(self, chunk: dict[str, Any]) -> None:
        index = int(chunk.get("index", 0))
        reasons = self._reasons.setdefault(index, {"finish_reason": None})
        reasons |= {name: chunk[name] for name in _REASONS if chunk.get(name) is not None}
        self._is_chat = self._is_chat or "delta" in chunk
        for path, text in _texts_in(chunk.get("delta") or {"text": chunk.get("text")}, (index,)):
            is_once = path[-1] in _SAID_ONCE
            if text and is_once and self._texts[path].tell():
                continue
            self._texts[path].write(text)
            self._text_bytes += len(text.encode("utf-8", "surrogatepass"))
            self.has_text = self.has_text or bool(text and not is_once)


def _texts_in(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every text with the path to it; items of lists are told apart by their own index."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts_in(each, (*path, name))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            index = each.get("index", place) if isinstance(each, dict) else place
            yield from _texts_in(each, (*path, int(index)))


def _nested(texts: dict[tuple[Any, ...], str]) -> dict[Any, Any]:
    """Objects and lists from texts by path: the choices by their index."""
    root: dict[Any, Any] = {}
    for path, text in texts.items():
        if text or path[-1] not in _SAID_ONCE:
            node = root
            for step in path[:-1]:
                node = node.setdefault(step, {})
            node[path[-1]] = text
    return {index: _with_lists(choice) for index, choice in root.items()}


def _with_lists(node: Any) -> Any:
    """Lists for objects whose names are places."""
    if not isinstance(node, dict):
        return node
    found = {name: _with_lists(each) for name, each in node.items()}
    is_list = all(isinstance(name, int) for name in found)
    return [found[place] for place in sorted(found)] if is_list else found


class _Events:
    """The data of server-sent events, whose lines end in LF or CR LF.

    Source: WHATWG HTML, "Server-sent events". httpx-sse reads a response of httpx, not bytes that
    are on their way to somebody else.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []
        self.size = 0  # bytes of what is kept for an event that is not whole yet

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of every event that this piece completes."""
        self._rest += piece
        self.size += len(piece)
        if b"\n" in piece:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                yield from self._take(line)
            self.size = len(self._rest) + sum(map(len, self._data))

    def finish(self) -> Iterator[str]:
        """The data of an event whose end the stream did not mark."""
        yield from self._take(self._rest)
        yield from self._take(b"")

    def _take(self, line: bytes | bytearray) -> Iterator[str]:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
        elif not line and self._data:
            yield "\n".join(self._data)
            self._data = []
