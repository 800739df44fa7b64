"""Which rows make a step, and how rows become tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.data.answers import AnswerRow

# Rows of like length are sought within a chunk of so many batches: enough to pad little, few
# enough that the batches of an epoch still differ from those of the next.
_CHUNK_BATCHES = 32


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows as tensors.

    Attributes:
        tokens: [B, L] int64, padded with 0 at the end.
        loss_mask: [B, L] bool, the target's own answers.
        num_tokens: without padding.
    """

    tokens: Tensor
    loss_mask: Tensor
    num_tokens: int


def collate(rows: Sequence[AnswerRow], device: torch.device | str = "cpu") -> TokenBatch:
    """Pad rows to the longest one."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = torch.tensor(row.tokens)
        for start, end in row.answers:
            mask[place, start:end] = True
    num_tokens = sum(len(row.tokens) for row in rows)
    return TokenBatch(tokens.to(device), mask.to(device), num_tokens)


class StepPlan:
    """The rows of every step, a function of the seed and the step alone.

    Each epoch shuffles the rows, sorts them by length within chunks, cuts them into batches and
    shuffles those. A step takes `num_processes * num_accumulated` of them; the last one of an epoch
    may take fewer, the same number for every process.

    Args:
        lengths: of the rows.
        batch_size: rows of a batch.
        num_accumulated: batches that a process takes for one step.
        num_processes: that share a step.
        seed: of the shuffles.

    Raises:
        ValueError: too few rows to give every process a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        num_accumulated: int = 1,
        num_processes: int = 1,
        seed: int = 0,
    ) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._num_processes = num_processes
        self._step_size = num_processes * num_accumulated
        num_batches = -(-len(lengths) // batch_size) // num_processes * num_processes
        if not num_batches:
            raise ValueError(
                f"{len(lengths)} rows make too few batches of {batch_size} for {num_processes} "
                "processes; lower batch_size"
            )
        self._num_batches = num_batches
        self.steps_per_epoch = -(-num_batches // self._step_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batches(self, step: int) -> list[list[int]]:
        """Row numbers of each batch of a step, counted from 0; process p takes every P-th."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place * self._step_size : (place + 1) * self._step_size]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size, chunk_size = self._batch_size, self._batch_size * _CHUNK_BATCHES
        batches = []
        for start in range(0, len(order), chunk_size):
            chunk = sorted(order[start : start + chunk_size], key=self._lengths.__getitem__)
            batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[place] for place in mixed[: self._num_batches]]
