"""How many nodes the next step may draft: by a schedule, or learned as decoding goes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from specdec.metrics import StepRecord


class DraftLength(Protocol):
    """Chooses before every step; what it knows is the past, so that the output stays lossless."""

    def choose(self, batch_size: int) -> int | None:
        """Most nodes that a row may draft in the next step; 0 decodes plainly, None is no limit."""

    def learn(self, records: Sequence[StepRecord]) -> None:
        """Take in the step's records, one a row."""


class Schedule:
    """A fixed number of nodes for each batch size.

    Args:
        nodes: most nodes a row by batch size; the entry of the largest key that is not above the
            batch size counts, so there must be one for 1. None is no limit.

    Raises:
        ValueError: an entry that cannot be, or none for 1.
    """

    def __init__(self, nodes: Mapping[int, int | None]) -> None:
        if 1 not in nodes:
            raise ValueError(f"nodes is {dict(nodes)} but needs an entry for batch size 1; add it")
        for batch_size, count in nodes.items():
            if not isinstance(batch_size, int) or batch_size < 1:
                raise ValueError(f"batch size {batch_size!r} must be a whole number of at least 1")
            if count is not None and (not isinstance(count, int) or count < 0):
                raise ValueError(
                    f"nodes for batch size {batch_size} is {count!r} but must be a whole number of "
                    "at least 0, or None for no limit"
                )
        self._nodes = dict(nodes)

    def choose(self, batch_size: int) -> int | None:
        """See `DraftLength`."""
        return self._nodes[max(size for size in self._nodes if size <= batch_size)]

    def learn(self, records: Sequence[StepRecord]) -> None:
        """Nothing: the schedule is fixed."""
