"""Time spent inside model forwards and other work, without adding a host synchronisation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardClock:
    """Adds up the time of the forwards wrapped in `with clock.forward():`.

    On a CPU this is wall time. On CUDA it is device time between two events; `take()` is called
    after the step's one host synchronisation, when the events have already completed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time one model forward."""
        if not self._on_cuda:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def take(self) -> float:
        """Seconds since the last call, and start again from zero."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events = []
        return self._restart()

    def take_completed(self) -> float:
        """Seconds of what has completed, without waiting; the rest counts with the next call."""
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1000
        return self._restart()

    def _restart(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds
