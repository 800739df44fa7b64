"""Server-sent events, as they arrive in pieces that know nothing of lines."""

from collections.abc import Iterator


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
