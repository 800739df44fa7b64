"""Timed steps of the loop: short decodings in a few shapes, with plain ones in between."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import trim_mean
from torch import nn

from specdec.engine.decode import generate
from specdec.engine.interfaces import Drafter
from specdec.engine.request import Result
from specdec.planning.candidates import Candidate
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig

# Share of the slowest and of the fastest steps that a mean leaves out: other programs' noise.
TRIMMED = 0.1
# Runs between two plain ones, whose mean is what the machine could do at that moment.
RUNS_PER_PLAIN = 4
PARTS = ("draft_s", "target_s", "other_s")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: in the drafter's forwards, in the target's, and everything else."""

    draft_s: float
    target_s: float
    other_s: float

    @property
    def wall_s(self) -> float:
        """Seconds of the whole step."""
        return self.draft_s + self.target_s + self.other_s

    def ms(self) -> dict[str, float]:
        """Milliseconds of "draft", "target", "other" and "wall"."""
        parts = ("draft", "target", "other", "wall")
        return {part: 1000 * getattr(self, f"{part}_s") for part in parts}

    @classmethod
    def weighted(cls, parts: Sequence[tuple[float, "StepTime"]]) -> "StepTime":
        """The sum of steps, each times its weight."""
        return cls(*(sum(weight * getattr(step, part) for weight, step in parts) for part in PARTS))


@dataclass(frozen=True, kw_only=True)
class Step(StepTime):
    """One step of a timed decoding.

    Attributes:
        context: tokens in the cache, the mean of the rows.
        nodes: drafted, the most of any row: the forward was padded to them.
    """

    context: float
    nodes: int


def mean_step(steps: Sequence[tuple[float, StepTime]]) -> StepTime:
    """The trimmed mean of steps, each at its scale."""
    scale = np.array([scale for scale, _ in steps])
    times = [np.array([getattr(step, part) for _, step in steps]) * scale for part in PARTS]
    return StepTime(*(float(trim_mean(each, TRIMMED)) for each in times))


@dataclass(frozen=True)
class Workload:
    """The prompts, as token ids, that are decoded while steps are timed."""

    prompts: Sequence[list[int]]
    sampling: SamplingConfig
    max_new_tokens: int
    rule: str


class Drafters:
    """Builds drafters for timing; those that differ in their shape alone share their weights."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._built: dict[str, Drafter] = {}
        self._first: dict[str, Drafter] = {}

    def get(self, candidate: Candidate, generation: int = 0) -> Drafter:
        """The drafter of a candidate, built at the first call of each generation.

        A drafter that remembers what it saw drafts better there than on a new prompt: ask for
        another generation before it sees a prompt again.
        """
        key = f"{candidate.key} {generation}"
        if key not in self._built:
            built = load_drafter({"type": candidate.type, **candidate.options}, self._target)
            owner = self._first.setdefault(candidate.drafter, built)
            for mine, theirs in zip(_modules(built), _modules(owner), strict=True):
                for parameter, shared in zip(mine.parameters(), theirs.parameters(), strict=True):
                    parameter.data = shared.data
            self._built[key] = built
        return self._built[key]


def _modules(drafter: Any) -> Iterator[nn.Module]:
    """The networks that a drafter holds, itself or in a model of its own."""
    for value in vars(drafter).values():
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(getattr(value, "model", None), nn.Module):
            yield value.model


def sequence(candidates: Sequence[Candidate]) -> list[Candidate | None]:
    """The runs of a round: None is plain decoding, first, last, and after every few others."""
    runs: list[Candidate | None] = [None]
    for index, candidate in enumerate(candidates):
        runs.append(candidate)
        if (index + 1) % RUNS_PER_PLAIN == 0 or index + 1 == len(candidates):
            runs.append(None)
    return runs


def time_run(
    target: Any, drafter: Drafter | None, work: Workload, batch_size: int, first: int
) -> list[Step]:
    """Decode `batch_size` prompts from the `first` on, in a circle, and time the full batch."""
    places = [(first + row) % len(work.prompts) for row in range(batch_size)]
    prompts = [work.prompts[place] for place in places]
    room = target.max_context_len - max(map(len, prompts))
    results = generate(
        target,
        drafter,
        prompts,
        [replace(work.sampling, seed=work.sampling.seed + place) for place in places],
        max_new_tokens=min(work.max_new_tokens, room),
        batch_size=batch_size,
        rule=work.rule,
    )
    if any(result.finish_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    return _steps(results, batch_size)


def _steps(results: list[Result], batch_size: int) -> list[Step]:
    """The steps of a full batch; rows that began together share them."""
    longest = max(results, key=lambda result: len(result.records))
    # Between steps the loop retires rows and hands out tokens: time that no record holds.
    recorded = sum(record.wall_s for record in longest.records)
    between = max(0.0, longest.decode_s - recorded) / max(1, len(longest.records))
    steps: list[Step] = []
    contexts = [len(result.prompt_tokens) for result in results]
    for records in zip(*(result.records for result in results), strict=False):
        shared = records[0]
        if shared.batch_size != batch_size:
            break
        steps.append(
            Step(
                shared.draft_s,
                shared.target_s,
                max(0.0, shared.wall_s - shared.draft_s - shared.target_s + between),
                context=sum(contexts) / batch_size,
                nodes=max(record.num_drafted for record in records),
            )
        )
        contexts = [c + r.num_emitted for c, r in zip(contexts, records, strict=True)]
    return steps


def to_row(steps: Sequence[Step]) -> list[list[float]]:
    """Steps as JSON."""
    return [
        [round(s.context, 1), s.nodes, *(round(getattr(s, part), 8) for part in PARTS)]
        for s in steps
    ]


def from_row(rows: Sequence[Sequence[float]]) -> list[Step]:
    """Steps from JSON."""
    return [Step(*row[2:], context=row[0], nodes=int(row[1])) for row in rows]


@dataclass(frozen=True)
class TimedRun:
    """A decoding, beside what plain decoding took around it.

    Attributes:
        candidate: None for plain decoding.
        steps: steps of the full batch.
        plain_s: median seconds of the plain steps around it.
        round: runs of one round were decoded within seconds.
    """

    candidate: Candidate | None
    steps: list[Step]
    plain_s: float
    round: int = 0


def timed_runs(
    runs: Sequence[Candidate | None], found: Sequence[list[Step]], number: int = 0
) -> list[TimedRun]:
    """Put a round's decodings beside the plain ones around them; those without a step are left out.

    `found` are the steps of each of the `runs` that `sequence` gave.
    """
    plain = {
        index: median(step.wall_s for step in steps)
        for index, (run, steps) in enumerate(zip(runs, found, strict=True))
        if run is None and steps
    }
    timed = []
    for index, (run, steps) in enumerate(zip(runs, found, strict=True)):
        if not steps or not plain:
            continue
        before = max((i for i in plain if i <= index), default=min(plain))
        after = min((i for i in plain if i >= index), default=max(plain))
        timed.append(TimedRun(run, steps, (plain[before] + plain[after]) / 2, number))
    return timed
