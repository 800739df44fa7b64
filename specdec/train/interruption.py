"""SIGTERM and Ctrl-C: a run stops behind its running step, at a checkpoint."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

# A launcher passes on to its processes the Ctrl-C that the terminal has sent them already.
_SAME_PRESS_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped at a checkpoint.

    Attributes:
        status: exit status of the process, 128 and the signal's number.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name} at {checkpoint}; the same command resumes from there")
        self.status = 128 + number


class Interruption:
    """Notes SIGTERM and Ctrl-C while it is entered; a second Ctrl-C is a `KeyboardInterrupt`.

    Signal handlers belong to the main thread; in others nothing is noted.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}  # number -> when
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def counts(self) -> list[float]:
        """Of Ctrl-C and SIGTERM, 1 for each that came to this process; processes are summed."""
        return [float(n in self._received) for n in (signal.SIGINT, signal.SIGTERM)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._received.setdefault(number, now)
        if number == signal.SIGINT and now - first > _SAME_PRESS_S:
            raise KeyboardInterrupt


def signal_of(counts: list[float]) -> int | None:
    """The signal that stops a run, of `Interruption.counts` or their sum over processes."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    return next((number for number, count in zip(numbers, counts, strict=True) if count), None)
