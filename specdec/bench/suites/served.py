"""What one request, and what one call of several, gave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from specdec.bench.outcome import Memory, Run
from specdec.metrics import StepRecord


@dataclass(frozen=True)
class Served:
    """A request as its user saw it; times are seconds after the call's start.

    Attributes:
        tokens: emitted ids.
        sent_s: when it was sent.
        queue_s: seconds until its prefill began.
        chunk_s: when each chunk came.
        chunk_tokens: tokens of each chunk.
        records: verify steps.
    """

    tokens: list[int]
    sent_s: float
    queue_s: float
    chunk_s: list[float]
    chunk_tokens: list[int]
    records: list[StepRecord] = field(default_factory=list)

    @property
    def end_s(self) -> float:
        """When the last chunk came."""
        return self.chunk_s[-1]

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in pairwise(self.chunk_s)]

    @property
    def run(self) -> Run:
        """The request as a bench's run: its time to the first token holds the queue."""
        first_s = self.chunk_s[0]
        return Run(
            self.tokens,
            self.chunk_tokens[0],
            first_s - self.sent_s,
            self.end_s - first_s,
            self.records,
        )


@dataclass(frozen=True)
class Power:
    """What a device drew during a call; None where it was not measured.

    Attributes:
        energy_j: joules of the whole device, other processes on it included.
        power_w: the same over the call's seconds.
    """

    energy_j: float | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class Call:
    """Requests that were served together.

    Attributes:
        rows: what each request gave, in their order, or the reason why it failed.
        wall_s: seconds from the start to the last chunk; None if a request failed.
        memory: while they were served.
        power: while they were served.
    """

    rows: list[Served | str]
    wall_s: float | None
    memory: Memory
    power: Power

    @property
    def served(self) -> Sequence[Served]:
        """The requests that did not fail."""
        return [row for row in self.rows if isinstance(row, Served)]
