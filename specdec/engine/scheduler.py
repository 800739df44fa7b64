"""Requests without a row: who joins next, and who has to wait longer."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from specdec.engine.interfaces import Drafter, HoldsCache, Target
from specdec.engine.request import Request

# What torch says on a CPU, from the driver, and from cuBLAS; only the allocator has a type for it.
_SIGNS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory has run out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class CacheLimit:
    """Bounds what is allocated for keys and values, the target's and the drafter's together.

    A cache is as long as its longest row for all its rows. So what counts is what will be allocated
    if every row runs to its last token, and exactly that is allocated when rows join.

    Args:
        target: tells and sizes its cache.
        drafter: as well, where it has one.
        max_bytes: of all of them between two steps.

    Raises:
        ValueError: a limit that cannot be, or a target that does not tell its cache's size.
    """

    def __init__(self, target: Target, drafter: Drafter | None, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_cache_bytes is {max_bytes} but must be at least 1, or None")
        if not isinstance(target, HoldsCache):
            raise ValueError(
                f"max_cache_bytes is {max_bytes} but {type(target).__name__} does not tell the "
                "size of its cache; leave the limit out, and bound max_rows"
            )
        self.max_bytes = max_bytes
        # Every owner, and what it is told of besides the committed tokens.
        self._owners: list[tuple[HoldsCache, int]] = [(target, drafter.max_nodes if drafter else 0)]
        if isinstance(drafter, HoldsCache):
            self._owners.append((drafter, 0))
        self._allocated = (0, 0)  # rows, tokens of each
        for owner, _ in self._owners:
            owner.reserve(1, 1, join=False)  # what an earlier call left would count as well

    def check(self, request: Request) -> None:
        """Refuse what does not even fit alone.

        Raises:
            ValueError: its cache would be larger than the limit.
        """
        needed = self._bytes(_size([request]))
        if needed > self.max_bytes:
            raise ValueError(
                f"prompt {request.index} needs {needed:,} bytes of cache for "
                f"{len(request.prompt)} tokens and {request.max_tokens} new ones but "
                f"max_cache_bytes is {self.max_bytes:,}; lower max_new_tokens, shorten the prompt "
                "or raise the limit"
            )

    def fits(self, rows: Sequence[Request]) -> bool:
        """Whether these rows can run together to their last tokens."""
        return self._bytes(_size(rows)) <= self.max_bytes

    def reserve(self, rows: Sequence[Request], *, join: bool) -> None:
        """Allocate for these rows, the last of which are about to join; they must fit."""
        size = _size(rows)
        if join:
            # What is allocated already stays, unless it is in the way.
            larger = (max(size[0], self._allocated[0]), max(size[1], self._allocated[1]))
            size = larger if self._bytes(larger) <= self.max_bytes else size
        if not join or size != self._allocated:
            for owner, extra in self._owners:
                owner.reserve(size[0], size[1] + extra, join=join)
        self._allocated = size

    def _bytes(self, size: tuple[int, int]) -> int:
        return sum(owner.bytes_for(size[0], size[1] + extra) for owner, extra in self._owners)


def _size(rows: Sequence[Request]) -> tuple[int, int]:
    """Rows, and tokens of the longest of them at its end."""
    return len(rows), max(len(row.prompt) + row.max_tokens for row in rows)


class WaitingLine:
    """First come, first served: a request joins as soon as there is room, and none overtakes.

    Args:
        max_rows: that run together, at most.
        limit: of the memory that their caches take; None for no limit.
    """

    def __init__(self, max_rows: int, limit: CacheLimit | None) -> None:
        self.max_rows, self.limit = max_rows, limit
        self._requests: deque[Request] = deque()
        # How many may run together until the crowd, which had no room, has ended.
        self._room, self._crowd = max_rows, list[Request]()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Come last."""
        self._requests.append(request)

    def take(self, rows: Sequence[Request]) -> list[Request]:
        """The requests that join these rows now, in order; they wait no longer."""
        self._crowd = [request for request in self._crowd if not request.finish_reason]
        room = self._room if self._crowd else self.max_rows
        joining = list[Request]()
        for request in islice(self._requests, min(room - len(rows), len(self))):
            if self.limit and not self.limit.fits([*rows, *joining, request]):
                break
            joining.append(request)
        for _ in joining:
            self._requests.popleft()
        return joining

    def drop_ended(self) -> list[Request]:
        """Let those that have ended leave; returns them."""
        ended = [request for request in self._requests if request.finish_reason]
        if ended:
            self._requests = deque(each for each in self._requests if not each.finish_reason)
        return ended

    def take_back(
        self, rows: Sequence[Request], joining: Sequence[Request], error: BaseException
    ) -> list[Request]:
        """Let rows wait again after a step that failed, each in the place that it came to.

        Args:
            rows: all of the step.
            joining: those of them that did not run before it.
            error: why it failed. Without memory for them fewer rows run together from now on, and
                one alone has to end; any other error ends those that joined, or all if none did. An
                interrupt ends none.

        Returns:
            Those that have ended.
        """
        if not is_out_of_memory(error):
            if isinstance(error, Exception):
                _end(joining or rows, error)
        elif len(rows) == 1:
            _end(rows, error)
        else:
            num_running = len(rows) - len(joining) if joining else 0
            self._room = num_running or (len(rows) + 1) // 2
            self._crowd += joining or rows
        self._requests = deque(sorted([*rows, *self._requests], key=lambda each: each.index))
        return self.drop_ended()


def _end(rows: Sequence[Request], error: BaseException) -> None:
    for row in rows:
        if not row.finish_reason:
            row.fail(f"prompt {row.index}: {type(error).__name__}: {error}")
