"""Scheduling: first come, first served, as many requests together as rows and memory allow."""

from collections.abc import Sequence

import torch

from specdec.engine.interfaces import Drafter, HoldsCache, Target
from specdec.engine.request import Request

# What torch says on a CPU, from the driver, and from cuBLAS; only the allocator has a type for it.
_SIGNS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if memory has run out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class Scheduler:
    """Holds the requests that wait and picks those that join; none overtakes another."""

    def __init__(self, max_rows: int, limit: "CacheLimit | None" = None) -> None:
        self.max_rows, self.limit = max_rows, limit
        self.waiting: list[Request] = []  # in the order that they came in
        # After memory ran out, so many may run until those that had no room have ended.
        self._reduced_rows = max_rows
        self._had_no_room: list[Request] = []
        self._has_just_joined = False

    def schedule(self, running: Sequence[Request], chunk: int | None = None) -> list[Request]:
        """Take the requests that join the running ones now off the queue.

        After some have joined, the rows that run have a step before others may join: short
        requests do not hold them up. Several join together only if their prompts, padding
        included, are within the `chunk` of tokens that running rows wait for.
        """
        joining: list[Request] = []
        longest = 0
        if not (self._has_just_joined and running):
            self._had_no_room = [each for each in self._had_no_room if not each.finish_reason]
            max_rows = self._reduced_rows if self._had_no_room else self.max_rows
            for request in self.waiting[: max(0, max_rows - len(running))]:
                if self.limit and not self.limit.fits([*running, *joining, request]):
                    break
                longest = max(longest, len(request.prompt) + len(request.tokens))
                if chunk and joining and (len(joining) + 1) * longest > chunk:
                    break
                joining.append(request)
            del self.waiting[: len(joining)]
        self._has_just_joined = bool(joining)
        return joining

    def requeue(self, rows: Sequence[Request]) -> None:
        """Let rows wait again, each in the place that it came to."""
        self.waiting = sorted({*rows, *self.waiting}, key=lambda row: row.index)

    def preempt(
        self, running: Sequence[Request], joining: Sequence[Request], error: BaseException
    ) -> list[Request]:
        """Requeue all rows of a step that failed; returns those that have ended.

        Without memory for them fewer rows run together from now on, and one alone has to end. Any
        other error ends those that were joining, or all if none was. An interrupt ends none.
        """
        rows, failed = [*running, *joining], joining or running
        if is_out_of_memory(error) and len(rows) > 1:
            beside_others = joining and running
            self._reduced_rows = len(running) if beside_others else (len(rows) + 1) // 2
            self._had_no_room += failed
        elif isinstance(error, Exception):
            for row in failed:
                if not row.finish_reason:
                    row.fail(f"prompt {row.index}: {type(error).__name__}: {error}")
        self.requeue(rows)
        return self.remove_ended()

    def remove_ended(self) -> list[Request]:
        """Take requests that have ended off the queue and return them."""
        ended = [request for request in self.waiting if request.finish_reason]
        self.waiting = [each for each in self.waiting if not each.finish_reason]
        return ended


class CacheLimit:
    """Bounds the bytes of keys and values between two steps, the target's and the drafter's.

    A cache is as long as its longest row for all its rows. So what counts is what will be allocated
    if every row runs to its last token, and exactly that is allocated when rows join.
    """

    def __init__(self, target: Target, drafter: Drafter | None, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_cache_bytes is {max_bytes} but must be at least 1, or None")
        if not isinstance(target, HoldsCache):
            name = type(target).__name__
            raise ValueError(
                f"max_cache_bytes: {name} does not tell the size of its cache; drop it"
            )
        self.max_bytes = max_bytes
        # Every owner, and the slots that it is told of besides those of committed tokens.
        self._owners: list[tuple[HoldsCache, int]] = [(target, drafter.max_nodes if drafter else 0)]
        if isinstance(drafter, HoldsCache):
            self._owners.append((drafter, 0))
        self._allocated = (0, 0)  # rows, tokens of each
        for owner, _ in self._owners:
            owner.reserve(1, 1, join=False)  # what an earlier call left would count as well

    def bytes_for(self, num_rows: int, num_tokens: int) -> int:
        """Return the bytes of all caches for so many rows with so many committed tokens each."""
        return sum(owner.bytes_for(num_rows, num_tokens + extra) for owner, extra in self._owners)

    def check(self, request: Request) -> None:
        """Refuse a request whose cache would not even fit alone."""
        needed = self.bytes_for(*_size([request]))
        if needed > self.max_bytes:
            raise ValueError(
                f"prompt {request.index} needs {needed:,} bytes of cache for "
                f"{len(request.prompt)} tokens and {request.max_tokens} new ones but "
                f"max_cache_bytes is {self.max_bytes:,}; lower max_new_tokens or raise the limit"
            )

    def fits(self, rows: Sequence[Request]) -> bool:
        """Tell if these rows can run together to their last tokens."""
        return self.bytes_for(*_size(rows)) <= self.max_bytes

    def reserve(
        self, rows: Sequence[Request], *, join: bool, apart: Sequence[Request] = ()
    ) -> None:
        """Allocate for these rows, the last of which are about to join; they must fit.

        Prompts that are cached `apart` for now must fit beside them.
        """
        size, longest = _size(rows), max((len(row.prompt + row.tokens) for row in apart), default=0)
        max_bytes = self.max_bytes - self.bytes_for(len(apart), longest)
        if join:
            # What is allocated already stays, unless it is in the way.
            larger = (max(size[0], self._allocated[0]), max(size[1], self._allocated[1]))
            size = larger if self.bytes_for(*larger) <= max_bytes else size
        if not join or size != self._allocated:
            for owner, extra in self._owners:
                owner.reserve(size[0], size[1] + extra, join=join)
        self._allocated = size


def _size(rows: Sequence[Request]) -> tuple[int, int]:
    """Return the number of rows, and the tokens of the longest of them at its end."""
    return len(rows), max(len(row.prompt) + row.max_tokens for row in rows)
