"""Rows of a run: read and split, planned into steps, and batched with the target's view of them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from specdec.checkpoints import TargetIdentity, identify_target
from specdec.common.provenance import machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers, read_rows
from specdec.data.feature_store import INDEX, FeatureStore
from specdec.drafters.training import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_ends, load_target
from specdec.targets.taps import run_whole
from specdec.train.config import DataConfig, TrainConfig
from specdec.train.results import DraftVocabulary


@dataclass(frozen=True)
class Split:
    """Rows to train on, rows held out for validation, and how many could not be used."""

    training: list[AnswerRow]
    validation: list[AnswerRow]
    num_dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """A short hash of the rows."""
        whole = hashlib.sha256()
        for row in (*self.training, *self.validation):
            whole.update(repr((row.tokens, row.answers)).encode())
        return whole.hexdigest()[:16]


def load_split(
    config: DataConfig, vocab_size: int, max_len: int, store: FeatureStore | None = None
) -> Split:
    """Read the rows, cut long ones, drop those that hold nothing to draft, and hold some out."""
    path = Path(config.path).expanduser()
    counts = {"train": config.max_rows, "held_out": config.num_validation}
    if store is not None:
        found = [store.rows(name)[: counts[name]] for name in counts if name in store.index.splits]
    elif path.is_dir():
        files = ((path / f"{name}.jsonl", count) for name, count in counts.items())
        found = [list(read_rows(file, vocab_size, count)) for file, count in files]
    else:
        found = [list(read_rows(path, vocab_size, config.max_rows))]
    cut = [[row.cut(max_len) for row in rows] for rows in found]
    # What can be used holds a root and one token to draft after it.
    training, *held_out = (
        [row for row in rows if any(end - start > 1 for start, end in row.answers)] for rows in cut
    )
    num_dropped = sum(map(len, cut)) - sum(map(len, [training, *held_out]))
    if not training:
        raise ValueError(
            f"{config.path} holds nothing to train on: none of its {len(cut[0])} rows has an "
            f"answer of two tokens within max_len {max_len}; raise data.max_len or give more rows"
        )
    if held_out:
        return Split(training, held_out[0], num_dropped)
    count = config.num_validation or round((config.validation_fraction or 0) * len(training))
    if count >= len(training):
        raise ValueError(
            f"{config.path} holds {len(training)} rows that can be used, and {count} of them "
            "would be for validation; lower data.num_validation or give more rows"
        )
    first = len(training) - count
    return Split(training[:first], training[first:], num_dropped)


@dataclass(frozen=True)
class StepBatch:
    rows: list[AnswerRow]
    step: int  # counted from 0
    place: int  # in its step
    weight: float  # share of the step's answer tokens; 0 only evens the processes' batches out


class StepPlan(IterableDataset):
    """The batches of one process in an epoch, a function of the seed and the epoch alone.

    Each epoch shuffles the rows, sorts them by length within chunks, cuts them into batches and
    shuffles those. A step takes `batches_per_step`, however many processes share them.
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
        self.epoch = 0  # that is iterated over
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
        """Return the batches of a step, of all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._shuffled[0]:
            self._shuffled = epoch, self._shuffle(epoch)
        return self._shuffled[1][place * self._step_size : (place + 1) * self._step_size]

    def rows(self, step: int) -> list[AnswerRow]:
        return [row for batch in self.batches(step) for row in batch]

    def _shuffle(self, epoch: int) -> list[list[AnswerRow]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        # Chunks are small enough that the batches of an epoch differ from those of the next.
        size, chunk_size = self._batch_size, self._batch_size * 32
        batches = []
        for start in range(0, len(order), chunk_size):
            chunk = [self._rows[number] for number in order[start : start + chunk_size]]
            chunk.sort(key=lambda row: len(row.tokens))
            batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[place] for place in mixed]


def lay_out(
    lengths: Sequence[int], pack_len: int | None = None
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Place texts: line and first column of each, and how many lines and columns there are.

    Each has a line, or they are packed first-fit into lines of `pack_len`, longest first.
    """
    longest = max(lengths)
    if pack_len is None:
        return [(line, 0) for line in range(len(lengths))], (len(lengths), longest)
    if longest > pack_len:
        held = f"a packed line only {pack_len}"
        raise ValueError(f"a text has {longest} tokens but {held}; lower data.max_len to that")
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = [line for line, left in enumerate(room) if left >= lengths[text]]
        line = fits[0] if fits else len(room)
        if not fits:
            room.append(pack_len)
        places[text] = (line, pack_len - room[line])
        room[line] -= lengths[text]
    return places, (len(room), pack_len)


def collate(
    rows: Sequence[AnswerRow], pack_len: int | None, device: torch.device
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Make the parts of a `TrainingBatch` that need no target, and tell where each text is."""
    places, shape = lay_out([len(row.tokens) for row in rows], pack_len)
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    for row, (line, first) in zip(rows, places, strict=True):
        tokens[line, first : first + len(row.tokens)] = torch.tensor(row.tokens)
        positions[line, first:] -= positions[line, first].item()
        for start, stop in row.answers:
            # Nothing of a text stands before its first token: it cannot be predicted.
            mask[line, first + max(start, 1) : first + stop] = True
    parts = {"tokens": tokens, "loss_mask": mask}
    parts |= {} if pack_len is None else {"positions": positions}
    return {name: part.to(device) for name, part in parts.items()}, places


class OnlineSource:
    """Runs the target once over every batch.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from, and transformers tells packed texts apart by their positions.
    """

    def __init__(self, target: Any, taps: Sequence[int], dtype: torch.dtype) -> None:
        self.target, self.taps, self.dtype = target, tuple(taps), dtype

    @torch.no_grad()
    def batch(self, rows: Sequence[AnswerRow], pack_len: int | None = None) -> TrainingBatch:
        given, _ = collate(rows, pack_len, self.target.device)
        inputs = {"input_ids": given["tokens"], "position_ids": given.get("positions")}
        out, states = run_whole(self.target, self.taps, **inputs)
        hidden = {tap: states[tap].to(self.dtype) for tap in self.taps}
        return TrainingBatch(**given, hidden=hidden, target_logits=out.logits.to(self.dtype))


class StoredSource:
    """Reads what the target made of the rows: batches of `OnlineSource` but for what is rounded.

    Where a store has no logits, the target's vocabulary projection makes them from the last tap.
    Places whose next token is no answer's have zeros for logits; nothing is learned there.
    """

    def __init__(
        self, store: FeatureStore, target: Any, taps: Sequence[int], dtype: torch.dtype
    ) -> None:
        store.check_taps(taps)
        self.store, self.target, self.taps, self.dtype = store, target, tuple(taps), dtype
        last = set() if store.layout.top_k else {store.layout.num_layers}
        self._read = sorted({*taps, *last})

    def batch(self, rows: Sequence[AnswerRow], pack_len: int | None = None) -> TrainingBatch:
        given, places = collate(rows, pack_len, self.target.device)
        shape, sizes = given["tokens"].shape, self.store.layout
        kind: Any = {"dtype": self.dtype, "device": self.target.device}
        hidden = {tap: torch.zeros(*shape, sizes.width(tap), **kind) for tap in self.taps}
        logits = torch.zeros(*shape, sizes.vocab_size, **kind)
        for row, (line, first) in zip(rows, places, strict=True):
            stored = self.store.get(row.id, self._read, len(row.tokens))
            if tuple(stored.tokens.tolist()) != row.tokens:
                where = f"the row of that id in {str(self.store.folder)!r}"
                raise ValueError(f"row {row.id!r} has other tokens than {where}; train on that one")
            for tap in self.taps:
                hidden[tap][line, first : first + len(row.tokens)] = stored.hidden[tap].to(**kind)
            logits[line, first + stored.places.to(self.target.device)] = self._logits(stored)
        return TrainingBatch(**given, hidden=hidden, target_logits=logits)

    @torch.no_grad()
    def _logits(self, stored: Any) -> Tensor:
        """Return logits [P, V] of a row's places."""
        device, sizes = self.target.device, self.store.layout
        logits: Tensor
        if stored.logits is not None:
            logits = stored.logits.to(device).dense(sizes.vocab_size, self.dtype)
        else:
            projection = self.target.model.get_output_embeddings()
            weight = next(projection.parameters())
            states = stored.hidden[sizes.num_layers][stored.places]
            logits = projection(states.to(weight.device, weight.dtype)).to(device, self.dtype)
        return logits


Source = OnlineSource | StoredSource


@dataclass(frozen=True, eq=False)
class Materials:
    """The target, the rows, and where their features come from."""

    config: TrainConfig
    target: Any  # an `HFTarget`; with a store the `TargetEnds` that heads are built from
    identity: TargetIdentity
    split: Split
    where: dict[str, Any]  # the machine and the code, when the run was started
    store: FeatureStore | None = None  # where the target does not run beside the drafter

    def source(self, taps: Sequence[int], dtype: torch.dtype) -> Source:
        """Make the batches that a drafter with these taps and weights reads."""
        if self.store is None:
            return OnlineSource(self.target, taps, dtype)
        return StoredSource(self.store, self.target, taps, dtype)

    def whole_target(self) -> HFTarget:
        """Return a target that can decode; with a store it is loaded now."""
        whole: HFTarget = self.target
        if self.store is not None:
            whole = _load(self.config, self.target.device)
            self.store.check_target(whole)
        return whole


def load_materials(config: TrainConfig, device: torch.device) -> Materials:
    """Open the data of a run, and load as much of the target as it needs."""
    path, store = Path(config.data.path).expanduser(), None
    target: Any
    if (path / INDEX).is_file():
        store = FeatureStore.open(path)
        target = load_ends(config.target.path, dtype=config.target.dtype, device=device)
        store.check_target(target)
        identity = store.index.target
    else:
        target = _load(config, device)
        identity = identify_target(target)
        if path.is_dir():
            check_answers_target(load_answers(path), identity)
    context, max_len = target.max_context_len, config.data.max_len or target.max_context_len
    if max_len > context:
        raise ValueError(
            f"config data.max_len is {max_len} but the target's context is only {context}; lower it"
        )
    # A packed line holds any row whole.
    max_len = min(max_len, config.data.pack_len or max_len)
    split = load_split(config.data, target.vocab_size, max_len, store)
    return Materials(config, target, identity, split, machine(target), store)


def _load(config: TrainConfig, device: torch.device) -> HFTarget:
    target = load_target(**config.target.model_dump() | {"device": device})
    target.model.requires_grad_(False)
    return target


def choose_vocabulary(split: Split, size: int, vocab_size: int) -> tuple[Tensor, DraftVocabulary]:
    """Choose the `size` most frequent ids of the training answers, ascending; ties go to lower."""
    counts = _counts(split.training, vocab_size)
    tokens = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    held_out = _counts(split.validation, vocab_size)
    covered = [(each[tokens].sum() / each.sum()).item() for each in (counts, held_out)]
    return tokens, DraftVocabulary(
        size=size,
        training_coverage=covered[0],
        validation_coverage=covered[1] if split.validation else None,
    )


def _counts(rows: Sequence[AnswerRow], vocab_size: int) -> Tensor:
    spans = [row.tokens[start:end] for row in rows for start, end in row.answers]
    written = torch.tensor([token for span in spans for token in span], dtype=torch.long)
    return torch.bincount(written, minlength=vocab_size)


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Make noise a function of these numbers alone, so that there is no generator to save."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        torch.manual_seed(seed)
        yield
