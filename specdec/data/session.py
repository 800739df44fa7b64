"""What one command has done so far, counted and told to whoever shows it."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int, str], None]


class Session:
    """Counts since the command was given; what earlier ones did is not in it.

    Args:
        progress: called with dialogues done, dialogues in all, and a text.

    Attributes:
        tokens: emitted.
        seconds: of answering.
        prefills: of rows, each of which gives one token.
        forwards: of rows, prefills left out.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = self._total = 0
        self.tokens = self.prefills = self.forwards = 0
        self.seconds = 0.0

    def begin(self, done: int, total: int) -> None:
        """Say how many dialogues there are, and how many are done already."""
        self._done, self._total = done, total
        self._tell()

    def add(self, tokens: int, seconds: float, ended: int) -> None:
        """Count new tokens, the time since the last call, and dialogues that have ended."""
        self.tokens += tokens
        self.seconds += seconds
        self._done += ended
        self._tell()

    def _tell(self) -> None:
        rate = self.tokens_per_s or 0
        self._progress(self._done, self._total, f"{self.tokens:,} tokens, {rate:,.0f}/s")

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens emitted a second; None if nothing was."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def tau(self) -> float | None:
        """Tokens emitted per forward of a row; None if there was no forward."""
        return (self.tokens - self.prefills) / self.forwards if self.forwards else None

    def values(self) -> dict[str, Any]:
        """For the manifest, JSON values."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "tau": self.tau,
        }
