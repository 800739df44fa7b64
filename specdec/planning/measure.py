"""Everything that is timed for a plan, point by point, kept in a journal as it comes."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from specdec.common.files import Journal
from specdec.engine.interfaces import claimed
from specdec.engine.scheduler import is_out_of_memory
from specdec.planning.candidates import Candidate, rule_of
from specdec.planning.costs import ForwardCost, ForwardPoint, forward_points
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
from specdec.verify import Draft


@dataclass(frozen=True)
class Grid:
    """What is timed.

    Attributes:
        new_tokens: of a row's forward, the root included.
        batches: rows.
        contexts: tokens cached before; the middle one is timed with trees as well.
        repeats: rounds over all of it, each point twice a round.
    """

    new_tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 256, 1024)
    repeats: int = 3

    def within(self, max_context_len: int) -> "Grid":
        """The grid as far as the target's context holds it."""
        room = max_context_len - max(self.new_tokens)
        contexts = tuple(sorted({min(c, max(1, room)) for c in self.contexts}))
        tokens = tuple(n for n in self.new_tokens if n < max_context_len)
        return Grid(tokens, self.batches, contexts, self.repeats)

    @property
    def tree_context(self) -> int:
        """The context that trees are timed with."""
        return self.contexts[len(self.contexts) // 2]

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """Repeat, batch and context of every prefill; the expensive ones are spread evenly."""
        for repeat in range(self.repeats):
            for context in self.contexts:
                for batch in self.batches:
                    yield repeat, batch, context


def time_cell(target: Any, grid: Grid, batch: int, context: int) -> dict[str, Any]:
    """Time every number of new tokens behind one cached context.

    Args:
        target: an `HFTarget`; its cache is overwritten.
        grid: says which numbers, and whether trees are timed here.
        batch: rows.
        context: tokens cached in every row.

    Returns:
        {"chain": {new_tokens: seconds}, "tree": {...}}; {"skipped": reason} where it does not fit
        into memory.
    """
    try:
        with claimed(target):
            return _time_cell(target, grid, batch, context)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"batch {batch} with a context of {context} does not fit into memory"
    return {"skipped": reason}


@torch.inference_mode()
def _time_cell(target: Any, grid: Grid, batch: int, context: int) -> dict[str, Any]:
    root = torch.zeros(batch, dtype=torch.long, device=target.device)
    target.prefill([[token % target.vocab_size for token in range(context)]] * batch)
    kinds = ["chain", "tree"] if context == grid.tree_context else ["chain"]
    times: dict[str, dict[int, list[float]]] = {kind: {} for kind in kinds}
    _time(target, root, _draft("chain", batch, max(grid.new_tokens), target.device))
    for _ in range(2):
        for count in grid.new_tokens:
            for kind in kinds if count > 2 else ["chain"]:
                draft = _draft(kind, batch, count, target.device)
                times[kind].setdefault(count, []).append(_time(target, root, draft))
    # Other programs only ever add time.
    return {k: {n: min(each) for n, each in found.items()} for k, found in times.items()}


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


def _time(target: Any, root: torch.Tensor, draft: Draft) -> float:
    """Seconds of the forward alone; nothing is committed, so every call meets the same cache."""
    target.clock.take()
    target.score(root, draft)
    return float(target.clock.take())


# More than a quiet machine has: between the same steps, and of load for each core.
MAX_SPREAD, MAX_LOAD = 0.4, 1.25

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        grid: of isolated forwards.
        rounds: decodings of every timed shape at the planned batch size.
        batch_rounds: the same at each other batch size.
        finalists: the fastest configurations by the fits, which are timed as they are.
        final_rounds: decodings of each of them.
    """

    grid: Grid
    rounds: int
    batch_rounds: int
    finalists: int
    final_rounds: int


FULL = Effort(Grid(), rounds=6, batch_rounds=3, finalists=12, final_rounds=24)
QUICK = Effort(
    Grid((1, 2, 4, 8, 16), (1, 2), (16, 64), repeats=1),
    rounds=2,
    batch_rounds=1,
    finalists=4,
    final_rounds=2,
)


class Measurements:
    """Measures what the journal does not hold yet.

    Args:
        target: an `HFTarget`.
        work: what the timed decodings decode.
        effort: how much is measured.
        journal: of the plan's folder.
        progress: called with points done, points in all, and what runs next.
    """

    def __init__(
        self, target: Any, work: Workload, effort: Effort, journal: Journal, progress: Progress
    ) -> None:
        self._target, self._work, self._effort = target, work, effort
        self._journal, self._progress = journal, progress
        self._known = {_key(row): row for row in journal.entries}

    def forwards(self, batch_size: int) -> tuple[ForwardCost, list[ForwardPoint], list[str]]:
        """The target's forwards, the given batch size among them: fit, points, what did not fit."""
        grid = self._effort.grid.within(self._target.max_context_len)
        if batch_size not in grid.batches:
            sizes = tuple(sorted({*grid.batches, batch_size}))
            grid = Grid(grid.new_tokens, sizes, grid.contexts, grid.repeats)
        cells = list(grid.cells())
        rows: list[dict[str, Any]] = []
        for done, (repeat, batch, context) in enumerate(cells):
            self._progress(done, len(cells), f"forwards of {batch} rows behind {context} tokens")
            name = {"phase": "forward", "repeat": repeat, "batch": batch, "context": context}
            rows.append(self._row(name, partial(time_cell, self._target, grid, batch, context)))
        self._progress(len(cells), len(cells), "forwards")
        points = forward_points(rows)
        skipped = sorted({row["skipped"] for row in rows if "skipped" in row})
        return ForwardCost(points), points, skipped

    def decodings(
        self, candidates: Sequence[Candidate], batch_size: int, rounds: int, phase: str = "loop"
    ) -> list[TimedRun]:
        """Short decodings with every candidate, and plainly in between.

        Args:
            candidates: what drafts.
            batch_size: rows.
            rounds: decodings of each; every round has its own prompts.
            phase: name in the journal, another one for other candidates.

        Raises:
            RuntimeError: a batch of this size does not fit into memory.
        """
        found: list[TimedRun] = []
        # Afresh: a drafter may remember what it saw when other shapes were timed.
        self._drafters = Drafters(self._target)
        self._warm_up(candidates, batch_size, phase)
        for index in range(rounds):
            # Each round begins with another one, so that none always follows plain decoding.
            first = index * len(candidates) // rounds
            runs = sequence([*candidates[first:], *candidates[:first]])
            steps = []
            for slot, run in enumerate(runs):
                # A configuration that is timed more than once a round meets other prompts.
                turn = index + rounds * runs[:slot].count(run) if run else index
                name = run.name if run else "plain"
                done = index * len(runs) + slot
                self._progress(done, rounds * len(runs), f"steps of {batch_size} rows: {name}")
                row = self._row(
                    _run_name(phase, batch_size, index, slot, name),
                    partial(self._decode, run, batch_size, turn),
                )
                steps.append(from_row(row["steps"]))
            found += timed_runs(runs, steps, index)
        self._progress(rounds * len(runs), rounds * len(runs), "steps")
        return found

    def trust(self, runs: Sequence[TimedRun]) -> dict[str, Any]:
        """Judge whether the machine was quiet: how far a step differs, and the load meanwhile.

        Args:
            runs: timed decodings of one batch size, plain ones among them.
        """
        plain = [run for run in runs if run.candidate is None]
        steps_ms = [1000 * median(step.wall_s for step in run.steps) for run in plain]
        low, middle, high = (float(x) for x in np.quantile(steps_ms, [0.1, 0.5, 0.9]))
        load = median(row.get("load", 0.0) for row in self._known.values())
        cores = os.cpu_count() or 1
        reasons = []
        if high - low > MAX_SPREAD * middle:
            reasons.append(f"the same step of plain decoding took {low:.1f} to {high:.1f} ms")
        if load > MAX_LOAD * cores:
            reasons.append(f"the load average was {load:.1f} on {cores} cores")
        return {
            "is_trusted": not reasons,
            "reasons": reasons,
            "plain_step_ms_range": [low, high],
            "load_average": load,
        }

    def _warm_up(self, candidates: Sequence[Candidate], batch_size: int, phase: str) -> None:
        """Decode once with each drafter, unless all is measured: first steps are slow."""
        for slot, candidate in enumerate(sequence(candidates)):
            name = candidate.name if candidate else "plain"
            if _key(_run_name(phase, batch_size, 0, slot, name)) not in self._known:
                self._decode(candidate, batch_size, -1)

    def _decode(self, run: Candidate | None, batch_size: int, turn: int) -> dict[str, Any]:
        """Decode the prompts of a turn; each drafter sees a prompt once, as in a bench."""
        first = turn * batch_size
        generation = 0
        if run and rule_of(run.type).varies:
            generation = (first + batch_size - 1) // len(self._work.prompts)
        drafter = self._drafters.get(run, generation) if run else None
        return {"steps": to_row(time_run(self._target, drafter, self._work, batch_size, first))}

    def _row(self, name: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The journal's row of this name, measured now if it is not there."""
        key = _key(name)
        if key not in self._known:
            row = {**name, **measure(), "load": os.getloadavg()[0]}
            self._journal.append(row)
            self._known[key] = row
        return self._known[key]


def _run_name(phase: str, batch_size: int, index: int, slot: int, name: str) -> dict[str, Any]:
    return {"phase": phase, "batch": batch_size, "round": index, "slot": slot, "name": name}


def _key(row: dict[str, Any]) -> str:
    names = ("phase", "repeat", "batch", "context", "round", "slot", "name")
    return repr([row.get(name) for name in names])


def fits(measure: Callable[[], list[TimedRun]]) -> list[TimedRun] | None:
    """What was timed, or None where memory ran out."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None
