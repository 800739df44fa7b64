"""Text of a growing token sequence, piece by piece."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns tokens into text as they come, and never takes a piece back.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens=True)`; None gives empty pieces.
        stop: strings that end the text; they and what follows are not given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._settled_tokens = 0
        self._pending = ""

    def push(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Add tokens; returns the text that is settled now."""
        if self._tokenizer is None:
            return ""
        self._tokens.extend(tokens)
        self._pending += self._new_text(is_last)
        cut = [i for i in map(self._pending.find, self._stop) if i >= 0]
        if cut:
            self._pending = self._pending[: min(cut)]
        held = 0 if is_last or cut else self._held_back()
        settled = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(settled) :]
        return settled

    def _new_text(self, is_last: bool) -> str:
        # The settled tokens in front keep the tokenizer's spacing right at the seam.
        context = self._tokens[max(0, self._settled_tokens - 6) : self._settled_tokens]
        fresh = self._tokens[self._settled_tokens :]
        before = self._tokenizer.decode(context, skip_special_tokens=True)
        text = self._tokenizer.decode([*context, *fresh], skip_special_tokens=True)
        if text.endswith("\ufffd") and not is_last:
            return ""  # half a character: wait for its other bytes
        self._settled_tokens = len(self._tokens)
        return str(text[len(before) :])

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that could begin a stop string."""
        lengths = [
            size
            for stop in self._stop
            for size in range(1, len(stop))
            if self._pending.endswith(stop[:size])
        ]
        return max(lengths, default=0)
