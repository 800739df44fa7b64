"""Undo the content coding of an answer, in pieces of bounded size."""

import zlib
from collections.abc import Iterator

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
