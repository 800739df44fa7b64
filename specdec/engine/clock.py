"""Time spent inside model forwards and other work, without adding a host synchronization."""

import time

import torch


class ForwardClock:
    """Adds up the time of the forwards wrapped in `with clock.forward():`.

    On a CPU this is wall time. On CUDA it is device time between two events; `take()` is called
    after the step's one host synchronization, when the events have already completed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def forward(self) -> "ForwardClock":
        """Time one model forward: `with clock.forward():`. Forwards do not nest."""
        return self

    def __enter__(self) -> None:
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events.append((start, end))
            start.record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self._on_cuda:
            self._seconds += time.perf_counter() - self._started
        elif error_type is None:
            self._events[-1][1].record()
        else:
            del self._events[-1]

    def take(self) -> float:
        """Return the seconds since the last call, and start again from zero."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events = []
        return self._restart()

    def take_completed(self) -> float:
        """Return the seconds of what has completed, without waiting; the rest counts later."""
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1000
        return self._restart()

    def _restart(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds
