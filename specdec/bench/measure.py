"""Measuring one call of one arm: requests are served to their end, and every failure is kept."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from specdec.bench.config import SamplingOptions
from specdec.bench.meters import PowerMeter, read_peaks, reset_peaks
from specdec.bench.store import Call, Run
from specdec.bench.workloads import Request
from specdec.engine.engine import Engine
from specdec.engine.request import Result
from specdec.engine.scheduler import is_out_of_memory

# What ends one request but not the run: it is counted as failed and never timed.
PROMPT_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError)
Requests = Sequence[Request]


class Arm(Protocol):
    """Decodes the requests of a call.

    Attributes:
        cache_bytes: largest keys and values of the last call; None where they are not known.
        makes_trees: its drafts may branch.
    """

    cache_bytes: int | None
    makes_trees: bool

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        """Decode; returns a run for each request, or the reason why it failed."""


def measure_call(arm: Arm, requests: Requests, device: torch.device, meter: PowerMeter) -> Call:
    """Decode a call and measure it."""
    reset_peaks(device)
    meter.start()
    started = time.perf_counter()
    rows = decode_healthy(arm, requests, meter.look)
    took_s = time.perf_counter() - started
    energy_j = meter.stop()
    peaks = read_peaks(device, arm.cache_bytes)
    is_whole = all(isinstance(row, Run) for row in rows)
    return Call(rows, took_s if is_whole else None, peaks, energy_j)


def decode_healthy(
    arm: Arm, requests: Requests, after_step: Callable[[], None] = lambda: None
) -> list[Run | str]:
    """Decode requests; where some make the call fail, the others are decoded without them."""
    rows, reason, out_of_memory = _try(arm, requests, after_step)
    if rows is not None:
        return rows
    users = [request.user for request in requests]
    if len(requests) == 1 or len(set(users)) < len(users):
        return [reason] * len(requests)  # a user's requests follow each other
    if out_of_memory:
        return [f"{reason}; {_largest_batch(arm, requests, after_step)}"] * len(requests)
    alone = [_try(arm, [request], after_step)[:2] for request in requests]
    healthy = [place for place, (found, _) in enumerate(alone) if found is not None]
    if len(healthy) == len(requests):
        return [reason] * len(requests)  # only together do they fail
    again = decode_healthy(arm, [requests[p] for p in healthy], after_step) if healthy else []
    kept = dict(zip(healthy, again, strict=True))
    return [kept.get(place, why) for place, (_, why) in enumerate(alone)]


def _try(
    arm: Arm, requests: Requests, after_step: Callable[[], None]
) -> tuple[list[Run | str] | None, str, bool]:
    """The rows, or None with the reason and whether memory ran out."""
    try:
        return arm(requests, after_step), "", False
    except PROMPT_ERRORS as error:
        first_line = (str(error).splitlines() or ["no message"])[0]
        reason, out_of_memory = f"{type(error).__name__}: {first_line}", is_out_of_memory(error)
    # Only here is the error gone, and with it the frames that hold the batch's tensors.
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason, out_of_memory


def _largest_batch(arm: Arm, requests: Requests, after_step: Callable[[], None]) -> str:
    """The largest batch that does decode, found by halving, with the longest prompts in it."""
    longest = sorted(requests, key=lambda request: -len(request.prompt))
    size = len(requests) // 2
    while size:
        if _try(arm, longest[:size], after_step)[0] is not None:
            return f"{size} of these prompts fit together, set batch_size={size}"
        size //= 2
    return "one prompt alone does not fit, lower max_new_tokens or use a smaller target.dtype"


class _Users:
    """Senders of requests: each at its time of arrival, or when the one before is answered."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._queues: dict[int, deque[int]] = {}
        for place, request in enumerate(requests):
            self._queues.setdefault(request.user, deque()).append(place)
        self._busy: set[int] = set()

    @property
    def are_done(self) -> bool:
        return not self._queues

    def due(self, now_s: float) -> list[int]:
        """Places of the requests to send now, in the order of the call; they count as sent."""
        found = []
        for user, queue in list(self._queues.items()):
            while queue and self._is_due(self._requests[queue[0]], now_s):
                found.append(queue.popleft())
                self._busy.add(user)
            if not queue:
                del self._queues[user]
        return sorted(found)

    def _is_due(self, request: Request, now_s: float) -> bool:
        if request.arrival_s is None:
            return request.user not in self._busy
        return request.arrival_s <= now_s

    def answer(self, place: int) -> None:
        """A request is answered; its user is free."""
        self._busy.discard(self._requests[place].user)

    def next_arrival_s(self) -> float:
        """Time at which the next request is sent, while none is on its way."""
        return min(self._requests[queue[0]].arrival_s or 0.0 for queue in self._queues.values())


@dataclass
class _Live:
    """A request on its way: its place in the call, and what came so far."""

    place: int
    sent_s: float
    late_s: float
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)


def serve(
    engine: Engine,
    requests: Requests,
    sampling: SamplingOptions,
    after_step: Callable[[], None] = lambda: None,
) -> list[Run | str]:
    """Serve every request to its end.

    A request with a time of arrival counts as sent then, even if the engine was in the middle of
    a step: its user waits for that too.

    Args:
        engine: idle engine.
        requests: a user's in their order.
        sampling: settings of all; each request has its own seed.
        after_step: called after every step, outside of what it measures.

    Returns:
        What each request gave, in their order, or the reason why it failed.

    Raises:
        ValueError: a request can never fit.
    """
    users, live = _Users(requests), dict[int, _Live]()
    rows: dict[int, Run | str] = {}
    started = time.perf_counter()
    while live or not users.are_done:
        now_s = time.perf_counter() - started
        for place in users.due(now_s):
            request = requests[place]
            sent_s = now_s if request.arrival_s is None else request.arrival_s
            index = engine.submit(
                request.prompt,
                sampling.with_seed(request.seed),
                max_new_tokens=request.max_new_tokens,
            )
            live[index] = _Live(place, sent_s, now_s - sent_s)
        if not live:
            time.sleep(max(0.0, users.next_arrival_s() - now_s))
            continue
        chunks = engine.advance()
        now_s = time.perf_counter() - started
        for chunk in chunks:
            one = live[chunk.index]
            if chunk.tokens:
                one.chunk_s.append(now_s)
                one.chunk_tokens.append(len(chunk.tokens))
            if chunk.finish_reason:
                rows[one.place] = _finished(live.pop(chunk.index), engine.result(chunk.index))
                users.answer(one.place)
        after_step()
    return [rows[place] for place in range(len(requests))]


def _finished(live: _Live, result: Result) -> Run | str:
    if result.finish_reason == "error":
        return result.error
    return Run(
        tokens=result.tokens,
        num_first=live.chunk_tokens[0],
        ttft_s=result.ttft_s,
        decode_s=result.decode_s,
        records=result.records,
        sent_s=live.sent_s,
        queue_s=live.late_s + result.queue_s,
        chunk_s=live.chunk_s,
        chunk_tokens=live.chunk_tokens,
    )
