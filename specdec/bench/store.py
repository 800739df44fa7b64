"""The records of a run: a line a finished call, so that a killed run resumes."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from specdec.checkpoints.identity import TARGET, check_resumed
from specdec.common.files import Journal
from specdec.engine.metrics import StepRecord

RECORDS = "records.jsonl"
Key = tuple[int, int, str]  # repeat, call, arm


@dataclass(frozen=True)
class Run:
    """One request decoded once by one arm.

    Attributes:
        tokens: emitted ids, cut after the first end-of-sequence token, counted alike in all arms.
        num_first: tokens of the first chunk, which the decode speed leaves out.
        ttft_s: seconds from the start of its own prefill to the first chunk.
        decode_s: seconds from the first chunk to the last.
        records: verify steps; empty for transformers' arms.
        sent_s: when it was sent, seconds after the call's start.
        queue_s: seconds from sending to the start of its prefill.
        chunk_s: when each chunk came, seconds after the call's start.
        chunk_tokens: tokens of each chunk.
    """

    tokens: list[int]
    num_first: int
    ttft_s: float
    decode_s: float
    records: list[StepRecord] = field(default_factory=list)
    sent_s: float = 0.0
    queue_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)

    @property
    def waited_s(self) -> float:
        """Seconds from sending to the last token: queue and prefill included."""
        return self.queue_s + self.ttft_s + self.decode_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in pairwise(self.chunk_s)]


@dataclass(frozen=True)
class Peaks:
    """Memory while a call was served; see `results.Memory`."""

    peak_rss_bytes: int
    peak_device_bytes: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Call:
    """Requests that one arm served together.

    Attributes:
        rows: a run for each request, in their order, or the reason why it failed.
        wall_s: seconds of the whole call, prefills included; None if a request failed.
        memory: peaks of the call.
        energy_j: draw of the whole device; None where it was not measured.
    """

    rows: list[Run | str]
    wall_s: float | None
    memory: Peaks
    energy_j: float | None = None

    @property
    def runs(self) -> list[Run]:
        """The requests that did not fail."""
        return [row for row in self.rows if isinstance(row, Run)]


_KEYS, _CALL = ("repeat", "call", "arm"), TypeAdapter(Call)


class Store:
    """`records.jsonl`: provenance whenever a start measures something, and every finished call.

    What a killed run or a full disk left of a call is dropped, and that call decoded again.

    Args:
        folder: folder of the run; it is made.
        identity: facts that make a run the same run; see `Journal`.
        provenance: provenance of this start.

    Attributes:
        done: finished calls.
        provenance: that of the last start that measured anything.

    Raises:
        ValueError: the folder holds another run, or another process writes to it.
        OSError: it cannot be written, in words.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], provenance: dict[str, Any]
    ) -> None:
        checks = {TARGET: partial(check_resumed, folder)}
        self._journal = Journal(folder / RECORDS, identity, checks)
        self._unwritten: dict[str, Any] | None = provenance
        self.done: dict[Key, Call] = {}
        self.provenance = provenance
        for row in self._journal.entries:
            # A line that is whole and says something else is one more that is damaged.
            with suppress(KeyError, TypeError, AttributeError, ValueError):
                if "provenance" in row:
                    self.provenance = dict(row["provenance"])
                else:
                    repeat, number, arm = (row.pop(key) for key in _KEYS)
                    self.done[repeat, number, arm] = _CALL.validate_python(row)
        self._journal.entries.clear()

    def add(self, key: Key, call: Call) -> None:
        """Keep a finished call of one arm; `OSError` if it cannot be written."""
        if self._unwritten:
            self._journal.append({"provenance": self._unwritten})
            self.provenance, self._unwritten = self._unwritten, None
        where = dict(zip(_KEYS, key, strict=True))
        self._journal.append({**where, **_CALL.dump_python(call, mode="json")})
        self.done[key] = call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()
