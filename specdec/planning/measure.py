"""Everything that is timed for a plan, point by point, kept in a journal as it comes.

Steps of the loop are timed in short decodings in a few shapes, with plain ones in between.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import inf
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from specdec.analysis.predict import Predictor
from specdec.bench.workloads import Progress
from specdec.common.files import Journal
from specdec.engine.decode import generate
from specdec.engine.interfaces import Drafter, claimed
from specdec.engine.scheduler import is_out_of_memory
from specdec.planning.candidates import Candidate
from specdec.planning.results import Trust
from specdec.registry import load_drafter
from specdec.verify import Draft

# More than a quiet machine has: between the same steps, and of load for each core.
MAX_SPREAD, MAX_LOAD = 0.4, 1.25
# Runs between two plain ones, whose mean is what the machine could do at that moment.
RUNS_PER_PLAIN = 4

# Drafters by family, options and generation.
Built = dict[tuple[str, str, int], Drafter]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: decodings of every timed shape at the planned batch size.
        batch_rounds: the same at each other batch size.
        finalists: the fastest configurations by the fits, which are timed `final_rounds` times.
        new_tokens: tokens of a row's isolated forward, the root included.
        contexts: tokens cached before; the middle one is timed with trees as well.
        repeats: rounds over all isolated forwards, each point twice a round.
    """

    rounds: int = 6
    batch_rounds: int = 3
    finalists: int = 12
    final_rounds: int = 24
    new_tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 256, 1024)
    repeats: int = 3


FULL = Effort()
QUICK = Effort(2, 1, 4, 2, (1, 2, 4, 8, 16), (1, 2), (16, 64), 1)


@dataclass(frozen=True, eq=False)
class TimedRun:
    """A decoding, beside what plain decoding took around it.

    Attributes:
        candidate: None for plain decoding.
        steps: [steps, 5] steps of the full batch: tokens in the cache, the mean of the rows;
            nodes drafted, the most of any row; and seconds in the drafter, in the target, and of
            everything else.
        plain_s: median seconds of the plain steps around it.
        round: runs of one round were decoded within seconds.
    """

    candidate: Candidate | None
    steps: np.ndarray
    plain_s: float
    round: int = 0

    def at(self, plain_s: float) -> np.ndarray:
        """The steps at the speed at which a plain step takes `plain_s`."""
        scale = plain_s / self.plain_s
        return self.steps * np.array([1, 1, scale, scale, scale])


@torch.inference_mode()
def time_cell(
    target: Any, batch: int, context: int, counts: Sequence[int], kinds: Sequence[str]
) -> dict[str, Any]:
    """Time every number of new tokens behind one cached context; the target's cache is overwritten.

    The result is {"chain": {new_tokens: seconds}, "tree": {...}}, or {"skipped": reason} where it
    does not fit into memory.
    """
    root = torch.zeros(batch, dtype=torch.long, device=target.device)
    times: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    try:
        with claimed(target):
            target.prefill([[token % target.vocab_size for token in range(context)]] * batch)
            target.score(root, _draft("chain", batch, max(counts), target.device))
            for _, count, kind in product(range(2), counts, kinds):
                if kind == "tree" and count <= 2:
                    continue
                draft = _draft(kind, batch, count, target.device)
                # Nothing is committed, so every call meets the same cache.
                target.clock.take()
                target.score(root, draft)
                # Other programs only ever add time.
                times[kind][count] = min(times[kind].get(count, inf), target.clock.take())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"skipped": f"batch {batch} with a context of {context} does not fit into memory"}
    return times


def _draft(kind: str, batch: int, new_tokens: int, device: torch.device) -> Draft:
    """A draft of `new_tokens` - 1 nodes: a chain, or a tree of two branches."""
    tokens = torch.zeros(batch, new_tokens - 1, dtype=torch.long, device=device)
    if kind == "chain":
        return Draft.chain(tokens)
    parents = torch.tensor([-1, -1, *range(new_tokens - 3)], device=device)
    return Draft.tree(tokens, parents, depth=new_tokens // 2)


def get_drafter(target: Any, built: Built, candidate: Candidate, generation: int = 0) -> Drafter:
    """Build a drafter for timing, once; those that differ in their shape alone share weights.

    A drafter of another generation remembers none of the prompts that it saw.
    """
    key = (candidate.drafter, candidate.key, generation)
    if key not in built:
        built[key] = load_drafter(candidate.arm, target)
        owner = next(each for (name, *_), each in built.items() if name == candidate.drafter)
        for mine, theirs in zip(_parameters(built[key]), _parameters(owner), strict=True):
            mine.data = theirs.data
    return built[key]


def _parameters(drafter: Any) -> Iterator[nn.Parameter]:
    """Parameters of the networks that a drafter holds, itself or in a model of its own."""
    for value in vars(drafter).values():
        module = value if isinstance(value, nn.Module) else getattr(value, "model", None)
        if isinstance(module, nn.Module):
            yield from module.parameters()


def sequence(candidates: Sequence[Candidate]) -> list[Candidate | None]:
    """The runs of a round: None is plain decoding, first, last, and after every few others."""
    runs: list[Candidate | None] = [None]
    for first in range(0, len(candidates), RUNS_PER_PLAIN):
        runs += [*candidates[first : first + RUNS_PER_PLAIN], None]
    return runs


def time_run(
    work: Predictor, drafter: Drafter | None, batch_size: int, first: int
) -> list[list[float]]:
    """Decode `batch_size` prompts from the `first` on, in a circle; give steps as in `TimedRun`."""
    places = [(first + row) % len(work.texts) for row in range(batch_size)]
    texts = [work.texts[place] for place in places]
    results = generate(
        work.target,
        drafter,
        [text.prompt for text in texts],
        [replace(work.sampling, seed=work.sampling.seed + place) for place in places],
        max_new_tokens=min(text.max_tokens for text in texts),
        batch_size=batch_size,
        rule=work.rule,
    )
    if any(result.finish_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    longest = max(results, key=lambda result: len(result.records))
    # Between steps the loop retires rows and hands out tokens: time that no record holds.
    recorded = sum(record.wall_s for record in longest.records)
    between = max(0.0, longest.decode_s - recorded) / max(1, len(longest.records))
    steps: list[list[float]] = []
    cached = sum(len(result.prompt_tokens) for result in results)
    # Rows that began together share their steps.
    for records in zip(*(result.records for result in results), strict=False):
        shared = records[0]
        if shared.batch_size != batch_size:
            break
        other_s = max(0.0, shared.wall_s - shared.draft_s - shared.target_s + between)
        times = [round(each, 8) for each in (shared.draft_s, shared.target_s, other_s)]
        nodes = max(record.num_drafted for record in records)
        steps.append([round(cached / batch_size, 1), nodes, *times])
        cached += sum(record.num_emitted for record in records)
    return steps


def timed_runs(
    runs: Sequence[Candidate | None], found: Sequence[Sequence[Sequence[float]]], number: int
) -> list[TimedRun]:
    """Put a round's decodings beside the plain ones around them; those without a step go."""
    pairs = zip(runs, found, strict=True)
    tables = {place: (run, np.array(steps)) for place, (run, steps) in enumerate(pairs) if steps}
    plain = {
        place: float(np.median(table[:, 2:].sum(1)))
        for place, (run, table) in tables.items()
        if run is None
    }
    timed = []
    for place, (run, table) in tables.items() if plain else ():
        before = max((each for each in plain if each <= place), default=min(plain))
        after = min((each for each in plain if each >= place), default=max(plain))
        timed.append(TimedRun(run, table, (plain[before] + plain[after]) / 2, number))
    return timed


class Measurements:
    """Measures what the journal does not hold yet, along the texts of a predictor."""

    def __init__(
        self, work: Predictor, effort: Effort, journal: Journal, progress: Progress
    ) -> None:
        self.work, self.effort = work, effort
        self._journal, self.progress = journal, progress
        self._known = {_key(row["point"]): row for row in journal.entries}

    def forwards(self, batch_size: int) -> list[dict[str, Any]]:
        """Cells of the target's forwards as `time_cell` gives them, the batch size among them."""
        effort, target = self.effort, self.work.target
        most = target.max_context_len
        room = max(1, most - max(effort.new_tokens))
        contexts = sorted({min(context, room) for context in effort.contexts})
        counts = [count for count in effort.new_tokens if count < most]
        batches = sorted({*effort.batches, batch_size})
        cells = list(product(range(effort.repeats), contexts, batches))
        rows: list[dict[str, Any]] = []
        for done, (repeat, context, batch) in enumerate(cells):
            self.progress(done, len(cells), f"forwards of {batch} rows behind {context} tokens")
            point = {"phase": "forward", "repeat": repeat, "batch": batch, "context": context}
            kinds = ("chain", "tree") if context == contexts[len(contexts) // 2] else ("chain",)
            measure = partial(time_cell, target, batch, context, counts, kinds)
            rows.append({**point, **self._row(point, measure)})
        self.progress(len(cells), len(cells), "forwards")
        return rows

    def decodings(
        self, candidates: Sequence[Candidate], batch_size: int, rounds: int, phase: str = "loop"
    ) -> list[TimedRun]:
        """Short decodings of every candidate, plain ones in between; each round has its prompts."""
        found: list[TimedRun] = []
        # Afresh: a drafter may remember what it saw when other shapes were timed.
        drafters: Built = {}

        def point(index: int, slot: int, run: Candidate | None) -> dict[str, Any]:
            row = {"phase": phase, "batch": batch_size, "round": index, "slot": slot}
            return {**row, "name": run.name if run else "plain"}

        # Unless all is measured, decode once with each drafter: first steps are slow.
        for slot, run in enumerate(sequence(candidates)):
            if _key(point(0, slot, run)) not in self._known:
                self._decode(drafters, run, batch_size, -1)
        for index in range(rounds):
            # Each round begins with another one, so that none always follows plain decoding.
            first = index * len(candidates) // rounds
            runs = sequence([*candidates[first:], *candidates[:first]])
            steps = []
            for slot, run in enumerate(runs):
                # A configuration that is timed more than once a round meets other prompts.
                turn = index + rounds * runs[:slot].count(run) if run else index
                here = point(index, slot, run)
                what = f"steps of {batch_size} rows: {here['name']}"
                self.progress(index * len(runs) + slot, rounds * len(runs), what)
                decode = partial(self._decode, drafters, run, batch_size, turn)
                steps.append(self._row(here, decode)["steps"])
            found += timed_runs(runs, steps, index)
        self.progress(rounds * len(runs), rounds * len(runs), "steps")
        return found

    def trust(self, runs: Sequence[TimedRun]) -> Trust:
        """Judge if the machine was quiet, by plain decodings of one batch size and by the load."""
        plain = [run.steps[:, 2:].sum(1) for run in runs if run.candidate is None]
        steps_ms = [1000 * float(np.median(walls)) for walls in plain]
        low, middle, high = np.quantile(steps_ms, [0.1, 0.5, 0.9]).tolist()
        load = median(row.get("load", 0.0) for row in self._known.values())
        cores = os.cpu_count() or 1
        reasons = []
        if high - low > MAX_SPREAD * middle:
            reasons.append(f"the same step of plain decoding took {low:.1f} to {high:.1f} ms")
        if load > MAX_LOAD * cores:
            reasons.append(f"the load average was {load:.1f} on {cores} cores")
        measured: dict[str, Any] = {"plain_step_ms_range": (low, high), "load_average": load}
        return Trust(is_trusted=not reasons, reasons=reasons, **measured)

    def _decode(
        self, drafters: Built, run: Candidate | None, batch_size: int, turn: int
    ) -> dict[str, Any]:
        """Decode the prompts of a turn; each drafter sees a prompt once, as in a bench."""
        work, first, drafter = self.work, turn * batch_size, None
        if run:
            generation = (first + batch_size - 1) // len(work.texts) if run.rule.varies else 0
            drafter = get_drafter(work.target, drafters, run, generation)
        return {"steps": time_run(work, drafter, batch_size, first)}

    def _row(self, point: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The journal's row of this point, measured now if it is not there."""
        key = _key(point)
        if key not in self._known:
            self._known[key] = {"point": point, **measure(), "load": os.getloadavg()[0]}
            self._journal.append(self._known[key])
        return self._known[key]


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
