"""Everything that is timed for a plan, point by point, kept in a journal as it comes."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

from specdec.common.files import Journal
from specdec.engine.interfaces import claimed
from specdec.engine.scheduler import is_out_of_memory
from specdec.planning.candidates import Candidate
from specdec.planning.costs import ForwardCost, forward_points
from specdec.planning.results import Trust
from specdec.planning.times import (
    Drafters,
    TimedRun,
    Workload,
    from_row,
    sequence,
    time_run,
    timed_runs,
    to_row,
)
from specdec.registry import strategy
from specdec.verify import Draft

# More than a quiet machine has: between the same steps, and of load for each core.
MAX_SPREAD, MAX_LOAD = 0.4, 1.25

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: decodings of every timed shape at the planned batch size.
        batch_rounds: the same at each other batch size.
        finalists: the fastest configurations by the fits, which are timed as they are.
        final_rounds: decodings of each of them.
        new_tokens: tokens of a row's isolated forward, the root included.
        batches: rows of isolated forwards.
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

    def fitted_to(self, max_context_len: int, batch_size: int) -> "Effort":
        """The same, as far as the target's context holds it, the batch size among the batches."""
        room = max(1, max_context_len - max(self.new_tokens))
        return replace(
            self,
            new_tokens=tuple(n for n in self.new_tokens if n < max_context_len),
            batches=tuple(sorted({*self.batches, batch_size})),
            contexts=tuple(sorted({min(context, room) for context in self.contexts})),
        )


FULL = Effort()
QUICK = Effort(2, 1, 4, 2, (1, 2, 4, 8, 16), (1, 2), (16, 64), 1)


def time_cell(target: Any, effort: Effort, batch: int, context: int) -> dict[str, Any]:
    """Time every number of new tokens behind one cached context; the target's cache is overwritten.

    The result is {"chain": {new_tokens: seconds}, "tree": {...}}, or {"skipped": reason} where it
    does not fit into memory.
    """
    try:
        with claimed(target):
            return _time_cell(target, effort, batch, context)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"batch {batch} with a context of {context} does not fit into memory"
    return {"skipped": reason}


@torch.inference_mode()
def _time_cell(target: Any, effort: Effort, batch: int, context: int) -> dict[str, Any]:
    kinds = ["chain"]
    if context == effort.contexts[len(effort.contexts) // 2]:
        kinds.append("tree")
    root = torch.zeros(batch, dtype=torch.long, device=target.device)
    target.prefill([[token % target.vocab_size for token in range(context)]] * batch)
    times: dict[str, dict[int, list[float]]] = {kind: {} for kind in kinds}
    _seconds(target, root, _draft("chain", batch, max(effort.new_tokens), target.device))
    for _ in range(2):
        for count in effort.new_tokens:
            for kind in kinds if count > 2 else ["chain"]:
                draft = _draft(kind, batch, count, target.device)
                times[kind].setdefault(count, []).append(_seconds(target, root, draft))
    # Other programs only ever add time.
    return {k: {n: min(each) for n, each in found.items()} for k, found in times.items()}


def _seconds(target: Any, root: torch.Tensor, draft: Draft) -> float:
    """Seconds of the forward alone; nothing is committed, so every call meets the same cache."""
    target.clock.take()
    target.score(root, draft)
    return float(target.clock.take())


def _draft(kind: str, batch: int, new_tokens: int, device: torch.device) -> Draft:
    """A draft of `new_tokens` - 1 nodes: a chain, or a tree of two branches."""
    nodes = new_tokens - 1
    if not nodes:
        return Draft.empty(batch, device)
    tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
    if kind == "chain":
        return Draft.chain(tokens)
    parents = torch.tensor([-1, -1, *range(nodes - 2)], device=device)
    lengths = torch.full((batch,), nodes, device=device)
    return Draft.tree(tokens, parents.expand(batch, -1), lengths, (nodes + 1) // 2)


class Measurements:
    """Measures what the journal does not hold yet.

    Args:
        target: an `HFTarget`.
        work: prompts of the timed decodings.
        effort: how much is measured.
        journal: records in the plan's folder.
        progress: called with points done, points in all, and what runs next.
    """

    def __init__(
        self, target: Any, work: Workload, effort: Effort, journal: Journal, progress: Progress
    ) -> None:
        self._target, self._work, self._effort = target, work, effort
        self._journal, self._progress = journal, progress
        self._known = {_key(row["point"]): row for row in journal.entries}

    def forwards(self, batch_size: int) -> tuple[ForwardCost, list[str]]:
        """The cost of the target's forwards, the given batch size among them; what did not fit."""
        effort = self._effort.fitted_to(self._target.max_context_len, batch_size)
        cells = list(product(range(effort.repeats), effort.contexts, effort.batches))
        rows: list[dict[str, Any]] = []
        for done, (repeat, context, batch) in enumerate(cells):
            self._progress(done, len(cells), f"forwards of {batch} rows behind {context} tokens")
            point = {"phase": "forward", "repeat": repeat, "batch": batch, "context": context}
            cell = self._row(point, partial(time_cell, self._target, effort, batch, context))
            rows.append({**point, **cell})
        self._progress(len(cells), len(cells), "forwards")
        skipped = sorted({row["skipped"] for row in rows if "skipped" in row})
        return ForwardCost(forward_points(rows)), skipped

    def decodings(
        self, candidates: Sequence[Candidate], batch_size: int, rounds: int, phase: str = "loop"
    ) -> list[TimedRun]:
        """Short decodings with every candidate, and plainly in between.

        Every round has its own prompts. The journal knows other candidates by another phase.
        """
        found: list[TimedRun] = []
        # Afresh: a drafter may remember what it saw when other shapes were timed.
        drafters = Drafters(self._target)

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
                self._progress(index * len(runs) + slot, rounds * len(runs), what)
                row = self._row(here, partial(self._decode, drafters, run, batch_size, turn))
                steps.append(from_row(row["steps"]))
            found += timed_runs(runs, steps, index)
        self._progress(rounds * len(runs), rounds * len(runs), "steps")
        return found

    def trust(self, runs: Sequence[TimedRun]) -> Trust:
        """Judge if the machine was quiet, by plain decodings of one batch size and by the load."""
        plain = [run for run in runs if run.candidate is None]
        steps_ms = [1000 * median(step.wall_s for step in run.steps) for run in plain]
        low, middle, high = np.quantile(steps_ms, [0.1, 0.5, 0.9]).tolist()
        load = median(row.get("load", 0.0) for row in self._known.values())
        cores = os.cpu_count() or 1
        reasons = []
        if high - low > MAX_SPREAD * middle:
            reasons.append(f"the same step of plain decoding took {low:.1f} to {high:.1f} ms")
        if load > MAX_LOAD * cores:
            reasons.append(f"the load average was {load:.1f} on {cores} cores")
        return Trust(
            is_trusted=not reasons,
            reasons=reasons,
            plain_step_ms_range=(low, high),
            load_average=load,
        )

    def _decode(
        self, drafters: Drafters, run: Candidate | None, batch_size: int, turn: int
    ) -> dict[str, Any]:
        """Decode the prompts of a turn; each drafter sees a prompt once, as in a bench."""
        first = turn * batch_size
        generation = 0
        if run and strategy(run.type).shape_options.varies:
            generation = (first + batch_size - 1) // len(self._work.prompts)
        drafter = drafters.get(run, generation) if run else None
        return {"steps": to_row(time_run(self._target, drafter, self._work, batch_size, first))}

    def _row(self, point: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The journal's row of this point, measured now if it is not there."""
        key = _key(point)
        if key not in self._known:
            self._known[key] = {"point": point, **measure(), "load": os.getloadavg()[0]}
            self._journal.append(self._known[key])
        return self._known[key]


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
