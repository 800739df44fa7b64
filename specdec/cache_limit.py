"""Which requests fit together into the memory that caches may take."""

from collections.abc import Sequence

from specdec.interfaces import Drafter, HoldsCache, Target
from specdec.request import Request


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
