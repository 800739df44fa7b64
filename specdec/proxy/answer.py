"""What is kept of an answer while it passes."""

import json
from typing import Any, Protocol


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
