"""The time of a target forward against new tokens, batch and context."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from specdec.interfaces import claimed
from specdec.targets.memory import is_out_of_memory
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
