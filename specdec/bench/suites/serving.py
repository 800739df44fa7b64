"""Serve requests with one engine: users send, the batch takes what it has room for."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from specdec.bench.suites.ask import Ask
from specdec.bench.suites.served import Served
from specdec.engine import Engine
from specdec.request import Result
from specdec.sampling_config import SamplingConfig


@dataclass
class _Live:
    """A request on its way: its place in the call, and what came so far."""

    place: int
    sent_s: float
    late_s: float
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)

    def served(self, result: Result) -> Served | str:
        if result.finish_reason == "error":
            return result.error
        queue_s = self.late_s + result.queue_s
        return Served(
            result.tokens, self.sent_s, queue_s, self.chunk_s, self.chunk_tokens, result.records
        )


class _Users:
    """Who sends what next: at its time of arrival, or when the one before is answered."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = asks
        self._queues: dict[int, deque[int]] = {}
        for place, ask in enumerate(asks):
            self._queues.setdefault(ask.user, deque()).append(place)
        self._busy: set[int] = set()

    @property
    def are_done(self) -> bool:
        return not any(self._queues.values())

    def due(self, now_s: float) -> list[int]:
        """Places of the requests to send now, in the order of the call; they count as sent."""
        found = []
        for user, queue in self._queues.items():
            while queue and self._is_due(self._asks[queue[0]], now_s):
                found.append(queue.popleft())
                self._busy.add(user)
        return sorted(found)

    def _is_due(self, ask: Ask, now_s: float) -> bool:
        return ask.user not in self._busy if ask.arrival_s is None else ask.arrival_s <= now_s

    def answer(self, place: int) -> None:
        """A request is answered; its user is free."""
        self._busy.discard(self._asks[place].user)

    def next_arrival_s(self) -> float:
        """When the next request is sent, while none is on its way."""
        return min(self._asks[q[0]].arrival_s or 0.0 for q in self._queues.values() if q)


def serve(
    engine: Engine,
    asks: Sequence[Ask],
    sampling: SamplingConfig,
    after_step: Callable[[], None] = lambda: None,
) -> list[Served | str]:
    """Serve every request to its end.

    A request with a time of arrival counts as sent then, even if the engine was in the middle of
    a step: its user waits for that too.

    Args:
        engine: with nothing on its way.
        asks: a user's in their order.
        sampling: of all; each request has its own seed.
        after_step: called after every step, outside of what it measures.

    Returns:
        What each request gave, in their order, or the reason why it failed.

    Raises:
        ValueError: a request can never fit.
    """
    users, live = _Users(asks), dict[int, _Live]()
    served: dict[int, Served | str] = {}
    started = time.perf_counter()
    while live or not users.are_done:
        now_s = time.perf_counter() - started
        for place in users.due(now_s):
            number, one = _send(engine, asks, place, sampling, now_s)
            live[number] = one
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
                served[one.place] = live.pop(chunk.index).served(engine.result(chunk.index))
                users.answer(one.place)
        after_step()
    return [served[place] for place in range(len(asks))]


def _send(
    engine: Engine, asks: Sequence[Ask], place: int, sampling: SamplingConfig, now_s: float
) -> tuple[int, _Live]:
    """Submit a request; returns its number in the engine."""
    ask = asks[place]
    sent_s = now_s if ask.arrival_s is None else ask.arrival_s
    number = engine.submit(
        ask.prompt, replace(sampling, seed=ask.seed), max_new_tokens=ask.max_new_tokens
    )
    return number, _Live(place, sent_s, now_s - sent_s)
