"""Requests without a row: who joins next, and who has to wait longer."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from specdec.cache_limit import CacheLimit
from specdec.request import Request
from specdec.targets.memory import is_out_of_memory


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
