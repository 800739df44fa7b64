"""Near-duplicates among queries, found by MinHash."""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from specdec.data.query import Query
from specdec.data.split import plain

_SHINGLE_LEN = 5
_NUM_PERM = 64
# Missed ones cost more than candidates that the exact comparison then refuses.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.1, 0.9
# Standard errors of the estimate below the threshold, from which comparing is a waste.
_SLACK = 3.0


class NearDuplicates:
    """Queries that were seen, and whether another one is nearly one of them.

    Two queries are near-duplicates if both their last user turns and all that stands before these
    have at least `threshold` of their runs of five characters in common (Jaccard similarity).
    Comparing the turns apart keeps the turns of one long conversation, and questions behind the
    same long instructions. System messages are not compared.

    Source: Broder 1997, On the resemblance and containment of documents.
    """

    def __init__(self, threshold: float):
        """Start with no queries.

        Args:
            threshold: least similarity of near-duplicates, above 0 and at most 1.
        """
        from datasketch import MinHash, MinHashLSH

        weights = (_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
        self._threshold = threshold
        self._index = MinHashLSH(min(threshold, 0.99), _NUM_PERM, weights=weights)
        self._blank = MinHash(_NUM_PERM, hashfunc=crc32)
        self._queries: list[Query] = []
        self._signatures: list[NDArray[np.uint32]] = []

    def seen(self, query: Query) -> Query | None:
        """The earlier query that this one nearly repeats; without any it is added, and None."""
        context, last = _parts(query)
        signature = self._signature(context, last)
        for candidate in self._candidates(signature):
            its_context, its_last = _parts(self._queries[candidate])
            alike = min(_similarity(its_last, last), _similarity(its_context, context))
            if alike >= self._threshold:
                return self._queries[candidate]
        self._add(query, signature)
        return None

    def _add(self, query: Query, signature: NDArray[np.uint32]) -> None:
        self._index.insert(len(self._queries), self._hashed(signature), check_duplication=False)
        self._queries.append(query)
        self._signatures.append(signature)

    def _candidates(self, signature: NDArray[np.uint32]) -> Sequence[int]:
        found = sorted(self._index.query(self._hashed(signature)))
        if not found:
            return found
        shares = np.mean(np.stack([self._signatures[i] for i in found]) == signature, axis=1)
        error = (self._threshold * (1 - self._threshold) / (_NUM_PERM / 2)) ** 0.5
        least = self._threshold - _SLACK * error
        return [i for i, share in zip(found, shares, strict=True) if share >= least]

    def _signature(self, context: str, last: str) -> NDArray[np.uint32]:
        """Hashes of both parts in turn, so that a band of them agrees only where both parts do."""
        latter = self._minima(last)
        if not context:
            return latter
        both = np.empty(_NUM_PERM, np.uint32)
        both[0::2], both[1::2] = latter[: _NUM_PERM // 2], self._minima(context)[: _NUM_PERM // 2]
        return both

    def _minima(self, text: str) -> NDArray[np.uint32]:
        sketch = self._blank.copy()
        sketch.update_batch([run.encode() for run in _shingles(text)])
        return sketch.hashvalues

    def _hashed(self, signature: NDArray[np.uint32]) -> Any:
        """The signature as datasketch takes it."""
        sketch = self._blank.copy()
        sketch.hashvalues = signature
        return sketch


def _parts(query: Query) -> tuple[str, str]:
    """What stands before the last turn, and the turn; comparable texts of both."""
    before = (turn["content"] for turn in query.messages[:-1] if turn["role"] != "system")
    return plain(" ".join(before)), plain(query.last_turn)


def _shingles(text: str) -> set[str]:
    return {text[i : i + _SHINGLE_LEN] for i in range(max(1, len(text) - _SHINGLE_LEN + 1))}


def _similarity(one: str, other: str) -> float:
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)
