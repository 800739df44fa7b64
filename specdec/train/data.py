"""Rows of a run: read and split, laid out as tensors, and planned into steps."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from specdec.data.answers import AnswerRow, read_rows
from specdec.train.config import DataConfig
from specdec.train.results import DraftVocabulary

# A root and one token to draft behind it.
MIN_ANSWER_LEN = 2


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to validate on.

    Attributes:
        training: rows to train on.
        validation: held out; may be empty.
        num_dropped: rows left out because no answer of two tokens fits into `max_len`.
        fingerprint: a short hash of what is kept.
    """

    training: list[AnswerRow]
    validation: list[AnswerRow]
    num_dropped: int
    fingerprint: str


def load_split(config: DataConfig, vocab_size: int, max_len: int) -> Split:
    """Read the rows, cut long ones, and tell those apart that are for validation."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        training = read_rows(path / "train.jsonl", vocab_size, config.max_rows)
        held_out = read_rows(path / "held_out.jsonl", vocab_size, config.num_validation)
        return split_rows(config, list(training), list(held_out), max_len)
    return split_rows(config, list(read_rows(path, vocab_size, config.max_rows)), None, max_len)


def split_rows(
    config: DataConfig, rows: list[AnswerRow], held_out: list[AnswerRow] | None, max_len: int
) -> Split:
    """Cut rows, drop those that hold nothing to draft, and hold some out."""
    read = [row.cut(max_len) for row in rows]
    training = [row for row in read if _can_train(row)]
    num_dropped = len(read) - len(training)
    if not training:
        reason = f"none of its {len(read)} rows has an answer of {MIN_ANSWER_LEN} tokens"
        hint = f"{reason} within max_len {max_len}; raise data.max_len" if read else "it is empty"
        raise ValueError(f"{config.path} holds nothing to train on: {hint}")
    if held_out is not None:
        validation = [row for row in (row.cut(max_len) for row in held_out) if _can_train(row)]
        num_dropped += len(held_out) - len(validation)
        return Split(training, validation, num_dropped, _fingerprint([*training, *validation]))
    num_held_out = config.num_validation or round((config.validation_fraction or 0) * len(training))
    if num_held_out >= len(training):
        raise ValueError(
            f"{config.path} holds {len(training)} rows that can be used, and {num_held_out} of "
            "them would be for validation; lower data.num_validation or give more rows"
        )
    first = len(training) - num_held_out
    return Split(training[:first], training[first:], num_dropped, _fingerprint(training))


def _can_train(row: AnswerRow) -> bool:
    return any(end - start >= MIN_ANSWER_LEN for start, end in row.answers)


def _fingerprint(rows: Sequence[AnswerRow]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(repr((row.tokens, row.answers)).encode())
    return whole.hexdigest()[:16]


# Rows of like length are sought within a chunk of so many batches: enough to pad little, few
# enough that the batches of an epoch still differ from those of the next.
_CHUNK_BATCHES = 32


@dataclass(frozen=True)
class Layout:
    """Where each text of a batch stands."""

    places: tuple[tuple[int, int], ...]  # line and first column of each text
    shape: tuple[int, int]  # lines and columns
    is_packed: bool = False


def padded(lengths: Sequence[int]) -> Layout:
    """A line for each text, as long as the longest one."""
    return Layout(tuple((line, 0) for line in range(len(lengths))), (len(lengths), max(lengths)))


def packed(lengths: Sequence[int], line_len: int) -> Layout:
    """As few lines as first-fit makes of it, longest texts first."""
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
    """Texts as tensors: the part of a `TrainingBatch` that needs no target."""

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


@dataclass(frozen=True)
class StepBatch:
    """A batch of a step.

    Attributes:
        rows: texts of the batch.
        step: optimizer step, counted from 0.
        place: number of the batch in its step.
        weight: its share of the step's answer tokens; 0 for a batch that is only there so that
            all processes have equally many.
    """

    rows: list[AnswerRow]
    step: int
    place: int
    weight: float


class StepPlan(IterableDataset):
    """The batches of one process in an epoch, a function of the seed and the epoch alone.

    Each epoch shuffles the rows, sorts them by length within chunks, cuts them into batches and
    shuffles those. A step takes `batches_per_step` of all processes together, the last one of an
    epoch what is left; how many processes share them changes nothing.

    Attributes:
        epoch: number of the epoch that is iterated over.
        steps_per_epoch: optimizer steps.
    """

    def __init__(
        self,
        rows: Sequence[AnswerRow],
        batch_size: int,
        batches_per_step: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._step_size, self._rank, self._world = batches_per_step, rank, world
        self._num_batches = -(-len(rows) // batch_size)
        self.steps_per_epoch = -(-self._num_batches // batches_per_step)
        self.epoch = 0
        self._shuffled: tuple[int, list[list[AnswerRow]]] = (-1, [])

    def __len__(self) -> int:
        return -(-self._num_batches // self._world)

    def __iter__(self) -> Iterator[StepBatch]:
        for number in range(self._rank, len(self) * self._world, self._world):
            epoch_step, place = divmod(number, self._step_size)
            step = self.epoch * self.steps_per_epoch + epoch_step
            batches = self.batches(step)
            if place >= len(batches):
                yield StepBatch(batches[0], step, 0, weight=0.0)
            else:
                counts = [sum(row.num_answer_tokens for row in batch) for batch in batches]
                yield StepBatch(batches[place], step, place, counts[place] / sum(counts))

    def batches(self, step: int) -> list[list[AnswerRow]]:
        """The batches of a step, of all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._shuffled[0]:
            self._shuffled = epoch, self._shuffle(epoch)
        return self._shuffled[1][place * self._step_size : (place + 1) * self._step_size]

    def rows(self, step: int) -> list[AnswerRow]:
        """The rows of a step."""
        return [row for batch in self.batches(step) for row in batch]

    def _shuffle(self, epoch: int) -> list[list[AnswerRow]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        size, chunk_size = self._batch_size, self._batch_size * _CHUNK_BATCHES
        batches = []
        for start in range(0, len(order), chunk_size):
            chunk = [self._rows[number] for number in order[start : start + chunk_size]]
            chunk.sort(key=lambda row: len(row.tokens))
            batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[place] for place in mixed]


def choose_vocabulary(split: Split, size: int, vocab_size: int) -> tuple[Tensor, DraftVocabulary]:
    """Choose the `size` most frequent ids [size] of the training answers, ascending.

    Ties go to lower ids.
    """
    counts = _counts(split.training, vocab_size)
    tokens = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    held_out = _counts(split.validation, vocab_size)
    return tokens, DraftVocabulary(
        size=size,
        training_coverage=(counts[tokens].sum() / counts.sum()).item(),
        validation_coverage=(
            (held_out[tokens].sum() / held_out.sum()).item() if split.validation else None
        ),
    )


def _counts(rows: Sequence[AnswerRow], vocab_size: int) -> Tensor:
    written = [
        token for row in rows for start, end in row.answers for token in row.tokens[start:end]
    ]
    return torch.bincount(torch.tensor(written, dtype=torch.long), minlength=vocab_size)
