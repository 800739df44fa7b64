"""Which rows make a step, and how rows become tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.data.answers import AnswerRow

# Rows of like length are sought within a chunk of so many batches: enough to pad little, few
# enough that the batches of an epoch still differ from those of the next.
_CHUNK_BATCHES = 32


@dataclass(frozen=True)
class Layout:
    """Where each text of a batch stands.

    Attributes:
        places: (line, first column) of each text.
        shape: lines and columns of the batch.
        is_packed: some line holds several texts.
    """

    places: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    is_packed: bool = False


def padded(lengths: Sequence[int]) -> Layout:
    """A line for each text, as long as the longest one."""
    return Layout(tuple((line, 0) for line in range(len(lengths))), (len(lengths), max(lengths)))


def packed(lengths: Sequence[int], line_len: int) -> Layout:
    """As few lines as first-fit makes of it, longest texts first.

    Raises:
        ValueError: a text is longer than a line.
    """
    longest = max(lengths)
    if longest > line_len:
        raise ValueError(
            f"a text has {longest} tokens but a packed line only {line_len}; lower data.max_len "
            "to data.pack_len"
        )
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = (line for line, left in enumerate(room) if left >= lengths[text])
        line = next(fits, len(room))
        if line == len(room):
            room.append(line_len)
        places[text] = (line, line_len - room[line])
        room[line] -= lengths[text]
    return Layout(tuple(places), (len(room), line_len), is_packed=True)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Texts as tensors.

    Attributes:
        tokens: [B, L] int64, padded with 0 at the end.
        loss_mask: [B, L] bool, the target's own answers.
        positions: [B, L] int64, each token's place in its own text; None without packing.
    """

    tokens: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None


def collate(
    rows: Sequence[AnswerRow],
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
) -> TokenBatch:
    """Rows as tensors, padded to the longest one unless a layout says otherwise."""
    layout = layout or padded([len(row.tokens) for row in rows])
    tokens = torch.zeros(layout.shape, dtype=torch.long)
    mask = torch.zeros(layout.shape, dtype=torch.bool)
    positions = torch.arange(layout.shape[1]).repeat(layout.shape[0], 1)
    for row, (line, first) in zip(rows, layout.places, strict=True):
        end = first + len(row.tokens)
        tokens[line, first:end] = torch.tensor(row.tokens)
        positions[line, first:] -= positions[line, first].item()
        for start, stop in row.answers:
            # Nothing of a text stands before its first token: it cannot be predicted.
            mask[line, first + max(start, 1) : first + stop] = True
    return TokenBatch(
        tokens.to(device),
        mask.to(device),
        positions.to(device) if layout.is_packed else None,
    )


class StepPlan:
    """The rows of every step, a function of the seed and the step alone.

    Each epoch shuffles the rows, sorts them by length within chunks, cuts them into batches and
    shuffles those. A step takes `batches_per_step` of them, the last one of an epoch what is left.
    How many processes share a step changes nothing.

    Args:
        lengths: of the rows.
        batch_size: rows of a batch.
        batches_per_step: of all processes together.
        seed: of the shuffles.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        batches_per_step: int = 1,
        seed: int = 0,
    ) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._step_size = batches_per_step
        num_batches = -(-len(lengths) // batch_size)
        self.steps_per_epoch = -(-num_batches // batches_per_step)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batches(self, step: int) -> list[list[int]]:
        """Row numbers of each batch of a step, counted from 0."""
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
        return [batches[place] for place in mixed]
