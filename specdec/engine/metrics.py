"""Measured quantities, with one definition each.

S verify steps, D draft nodes verified, A draft tokens accepted, T tokens emitted; all after the
stop rule. Each step emits its accepted tokens and one more, the step's own (the bonus or corrected
token). Where a stop rule cuts a step short, its last kept token counts as its own, so that
T - 1 = A + S always holds (the first token is prefill's).

A speedup is the total decode time of plain decoding over the arm's, for the same prompts; where
texts differ, total tokens over total time in both. A mean of per-prompt ratios, which short, easy
answers dominate, stands beside it under its own name. What a drafter remembers of earlier prompts
is empty at the start of every repeat.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from itertools import zip_longest
from typing import Any, Self

import torch


class ForwardClock:
    """Adds up the time of the forwards wrapped in `with clock.forward():`.

    On a CPU this is wall time. On CUDA it is device time between two events, and no host
    synchronization is added: `take()` is called after the step's one, when they have completed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def forward(self) -> Self:
        """Time one model forward; one that raises does not count. Forwards do not nest."""
        return self

    def __enter__(self) -> None:
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events.append((start, end))
            start.record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            del self._events[-1:]
        elif self._on_cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self, *, wait: bool = True) -> float:
        """Return the seconds since the last call; without `wait` those of what has completed."""
        while self._events and (wait or self._events[0][1].query()):
            start, end = self._events.pop(0)
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True)
class StepRecord:
    """One verify step of one prompt. Times are those of the whole batch.

    Attributes:
        prompt: index of the prompt in its call.
        step: 0, 1, ... of this prompt.
        batch_size: rows that shared the forward.
        num_drafted: draft nodes verified in this row.
        num_accepted: draft tokens kept, bonus excluded, after the stop rule.
        depth_tested: deepest level of this row's draft that the rule judged.
        num_emitted: tokens kept, at most num_accepted + 1.
        draft_s: seconds in the drafter's forwards.
        target_s: seconds in the target's forward.
        wall_s: seconds of the whole step.
        verify_s: seconds of processing the logits and judging the draft.
        commit_s: seconds of moving the caches on, the drafter's forwards excluded. On CUDA what
            has not completed when a step ends counts with the next one.
    """

    prompt: int
    step: int
    batch_size: int
    num_drafted: int
    num_accepted: int
    depth_tested: int
    num_emitted: int
    draft_s: float
    target_s: float
    wall_s: float
    verify_s: float = 0.0
    commit_s: float = 0.0
    num_accepted_raw: int | None = None


@dataclass(frozen=True)
class AcceptanceStats:
    """Acceptance over any set of steps; sums, so that two of them can be added.

    Attributes:
        num_steps: S.
        num_drafted: D. For trees this counts every node.
        num_accepted: A.
        accepted_at: steps that accepted a token at depth 1, 2, ...
        tested_at: steps that judged a token at depth 1, 2, ...
    """

    num_steps: int
    num_drafted: int
    num_accepted: int
    accepted_at: tuple[int, ...]
    tested_at: tuple[int, ...]

    @classmethod
    def from_records(cls, records: Iterable[StepRecord]) -> "AcceptanceStats":
        """Add up the records of one prompt or of many."""
        rows = list(records)
        deepest = max((row.depth_tested for row in rows), default=0)
        depths = range(1, deepest + 1)
        return cls(
            num_steps=len(rows),
            num_drafted=sum(row.num_drafted for row in rows),
            num_accepted=sum(row.num_accepted for row in rows),
            accepted_at=tuple(sum(row.num_accepted >= d for row in rows) for d in depths),
            tested_at=tuple(sum(row.depth_tested >= d for row in rows) for d in depths),
        )

    def __add__(self, other: "AcceptanceStats") -> "AcceptanceStats":
        def total(one: Any, two: Any) -> Any:
            if isinstance(one, int):
                return one + two
            return tuple(map(sum, zip_longest(one, two, fillvalue=0)))

        return AcceptanceStats(*map(total, astuple(self), astuple(other)))

    @classmethod
    def as_engine(
        cls, engine: str, records: Iterable[StepRecord], max_new_tokens: int
    ) -> "AcceptanceStats":
        """Count the drafts of chains as the counters of a serving engine do.

        They differ in an answer's last steps alone. vLLM drafts its full length up to the end, and
        counts all that its rule accepts, also behind the end. llama.cpp drafts no more than can be
        emitted and counts what it keeps, and an end of sequence in a draft's last place besides.
        Both count no step that drafted nothing, so that num_steps is the number of drafts.

        Args:
            engine: "vllm" or "llamacpp".
            records: those of one call, in order, which decoded at least K tokens beyond
                `max_new_tokens` with drafts of K, so that these are whole up to there.
            max_new_tokens: tokens that the engine was asked for.

        Raises:
            ValueError: an unknown engine, or records that no rule judged.
        """
        if engine not in ("vllm", "llamacpp"):
            raise ValueError(f"engine is {engine!r} but must be vllm or llamacpp")
        num_emitted, drafts = Counter[int](), []
        for row in records:
            left = max_new_tokens - 1 - num_emitted[row.prompt]  # the first token is prefill's
            num_emitted[row.prompt] += row.num_emitted
            drafted, accepted = row.num_drafted, row.num_accepted_raw
            if accepted is None:
                raise ValueError("the records hold no verdicts (num_accepted_raw); decode anew")
            if engine == "llamacpp":
                drafted = min(drafted, left - 1)
                ends_with_it = drafted <= accepted and row.num_emitted == drafted
                accepted = drafted if ends_with_it else min(row.num_accepted, drafted)
            if left > 0 and drafted > 0:
                counts = {"num_drafted": drafted, "num_accepted": accepted}
                drafts.append(replace(row, **counts, depth_tested=min(accepted + 1, drafted)))
        return cls.from_records(drafts)

    @property
    def accepted_length(self) -> float:
        """Tau, 1 + A / S: tokens per target forward, the step's own included. 1.0 if S is 0."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """A / D, the share of the verified nodes; 0.0 if nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def acceptance_at_depth(self) -> tuple[float, ...]:
        """Steps that accepted at depth 1, 2, ... over all steps; they sum to tau - 1."""
        return tuple(count / self.num_steps for count in self.accepted_at)

    @property
    def conditional_acceptance_at_depth(self) -> tuple[float, ...]:
        """Steps that accepted at depth 1, 2, ... over the steps that tested that depth."""
        pairs = zip(self.accepted_at, self.tested_at, strict=True)
        return tuple(accepted / tested for accepted, tested in pairs)
