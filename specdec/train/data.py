"""Which rows are trained on, and which are held out."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.checkpoints import TargetIdentity, identify_target
from specdec.common.provenance import machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers, read_rows
from specdec.data.feature_format import INDEX
from specdec.data.feature_store import FeatureStore, StoredRow
from specdec.drafters.training import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.targets.partial import load_ends
from specdec.train.config import DataConfig, TrainConfig
from specdec.train.heads import Trainee, trained_dtype

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
    """Read the rows, cut long ones, and tell those apart that are for validation.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a line that is no row, or too few rows.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        training = read_rows(path / "train.jsonl", vocab_size, config.max_rows)
        held_out = read_rows(path / "held_out.jsonl", vocab_size, config.num_validation)
        return split_rows(config, list(training), list(held_out), max_len)
    return split_rows(config, list(read_rows(path, vocab_size, config.max_rows)), None, max_len)


def split_rows(
    config: DataConfig, rows: list[AnswerRow], held_out: list[AnswerRow] | None, max_len: int
) -> Split:
    """Cut rows, drop those that hold nothing to draft, and hold some out.

    Args:
        config: says how many are held out where `held_out` is None.
        rows: to train on.
        held_out: for validation.
        max_len: in tokens.

    Raises:
        ValueError: too few rows.
    """
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


Lay = Callable[[Sequence[int]], Layout]


class Source(Protocol):
    """Turns rows into what a drafter is trained on."""

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """The rows and the target's view of them.

        Args:
            rows: of the split that this source is for.
            lay: where to put texts of given lengths.
        """


class OnlineSource:
    """Runs the target on every batch.

    Args:
        target: in eval mode.
        taps: HF `hidden_states` indices to keep.
        dtype: of what is returned, the drafter's.
    """

    def __init__(self, target: HFTarget, taps: tuple[int, ...], dtype: torch.dtype) -> None:
        self.target, self.taps, self.dtype = target, taps, dtype

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """See `Source`."""
        layout = lay([len(row.tokens) for row in rows])
        return view(self.target, self.taps, collate(rows, self.target.device, layout), self.dtype)


def view(
    target: HFTarget, taps: tuple[int, ...], batch: TokenBatch, dtype: torch.dtype
) -> TrainingBatch:
    """Run the target once over whole texts, without a cache and without gradients.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from, and transformers tells packed texts apart by their positions. Of the hidden states only
    the taps outlive the call.

    Args:
        target: in eval mode.
        taps: HF `hidden_states` indices; the last one is after the final norm, as the vocabulary
            projection reads it.
        batch: on the target's device.
        dtype: of what is returned, the drafter's.
    """
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    with torch.no_grad():
        out = target.model(
            input_ids=batch.tokens, output_hidden_states=bool(taps), use_cache=False, **positions
        )
    return TrainingBatch(
        tokens=batch.tokens,
        loss_mask=batch.loss_mask,
        hidden={tap: out.hidden_states[tap].to(dtype) for tap in taps},
        target_logits=out.logits.to(dtype),
        positions=batch.positions,
    )


class StoredSource:
    """Reads what the target made of the rows.

    Batches are those of `OnlineSource` but for what the store rounds: bf16 or int8 taps, and the
    logits outside the top k, which are all alike (`TopLogits.dense`). Where a store has no logits
    at all, the vocabulary projection makes them from the last tap. Places whose next token is no
    answer's have zeros for logits; nothing is learned there.

    Args:
        store: of the rows that batches are asked for.
        taps: HF `hidden_states` indices that the drafter reads.
        dtype: of what is returned, the drafter's.
        device: of what is returned.
        projection: of the target, on that device; only used for a store without logits.

    Raises:
        ValueError: a tap that the store lacks, or no way to the logits.
    """

    def __init__(
        self,
        store: FeatureStore,
        taps: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        projection: nn.Module | None = None,
    ) -> None:
        store.check_taps(taps)
        layout = store.layout
        if not layout.top_k and projection is None:
            raise ValueError(
                f"{str(store.folder)!r} holds no logits, and no projection is given to compute "
                "them with; give the target's, or extract the features with --top-k 64"
            )
        self.store, self.taps, self.dtype = store, tuple(taps), dtype
        self.device, self._projection = torch.device(device), projection
        last = {layout.num_layers} if not layout.top_k else set()
        self._read = sorted({*taps, *last})

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """See `Source`.

        Raises:
            KeyError: a row that is not in the store.
            ValueError: a row whose tokens are not those that are stored under its id.
        """
        layout = lay([len(row.tokens) for row in rows])
        tokens = collate(rows, self.device, layout)
        sizes = self.store.layout
        hidden = {tap: self._zeros(*layout.shape, sizes.hidden_size) for tap in self.taps}
        logits = self._zeros(*layout.shape, sizes.vocab_size)
        for row, (line, first) in zip(rows, layout.places, strict=True):
            stored = self._row(row)
            for tap in self.taps:
                hidden[tap][line, first : first + len(row.tokens)] = stored.hidden[tap].to(
                    self.device, self.dtype
                )
            logits[line, first + stored.places.to(self.device)] = self._logits(stored)
        return TrainingBatch(
            tokens=tokens.tokens,
            loss_mask=tokens.loss_mask,
            hidden=hidden,
            target_logits=logits,
            positions=tokens.positions,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _row(self, row: AnswerRow) -> StoredRow:
        stored = self.store.get(row.id, self._read, max_len=len(row.tokens))
        if tuple(stored.tokens.tolist()) != row.tokens:
            raise ValueError(
                f"row {row.id!r} has other tokens than the row of that id in "
                f"{str(self.store.folder)!r}; train on the rows of the store itself"
            )
        return stored

    def _logits(self, stored: StoredRow) -> Tensor:
        """Logits [P, V] of a row's places."""
        if stored.logits is not None:
            top = stored.logits.to(self.device)
            return top.dense(self.store.layout.vocab_size, self.dtype)
        assert self._projection is not None
        states = stored.hidden[self.store.layout.num_layers][stored.places]
        weight = next(self._projection.parameters())
        with torch.no_grad():
            logits: Tensor = self._projection(states.to(weight.device, weight.dtype))
        return logits.to(self.device, self.dtype)


class Materials(Protocol):
    """Where rows and batches of a run come from."""

    @property
    def target(self) -> Any:
        """An `HFTarget`, or the `TargetEnds` that heads are built from."""

    @property
    def identity(self) -> TargetIdentity:
        """Of the target."""

    @property
    def split(self) -> Split:
        """Rows to train on and to validate on."""

    @property
    def where(self) -> dict[str, Any]:
        """The machine and the code, when the run was started."""

    def source(self, trainee: Trainee) -> Source:
        """Of the batches that a trainee reads."""

    def whole_target(self) -> HFTarget:
        """A target that can decode."""


@dataclass(frozen=True, eq=False)
class OnlineMaterials:
    """The target runs beside the drafter."""

    target: HFTarget
    identity: TargetIdentity
    split: Split
    where: dict[str, Any]

    def source(self, trainee: Trainee) -> Source:
        """See `Materials`."""
        return OnlineSource(self.target, trainee.taps, trained_dtype(trainee))

    def whole_target(self) -> HFTarget:
        """See `Materials`."""
        return self.target


@dataclass(frozen=True, eq=False)
class StoredMaterials:
    """What the target made of the rows is read from a feature store."""

    target: Any
    identity: TargetIdentity
    split: Split
    where: dict[str, Any]
    store: FeatureStore
    config: TrainConfig

    def source(self, trainee: Trainee) -> Source:
        """See `Materials`."""
        ends, dtype = self.target, trained_dtype(trainee)
        projection = ends.model.get_output_embeddings()
        return StoredSource(self.store, trainee.taps, dtype, ends.device, projection)

    def whole_target(self) -> HFTarget:
        """See `Materials`; loaded when it is asked for."""
        target = _load(self.config, self.target.device)
        self.store.check_target(identify_target(target))
        return target


def load_materials(config: TrainConfig, device: torch.device) -> Materials:
    """Open the data of a run, and load as much of the target as it needs.

    Raises:
        FileNotFoundError: no data, or no target.
        ValueError: rows or features of another target, a store or answers that are not finished,
            or too few rows.
    """
    path = Path(config.data.path).expanduser()
    if (path / INDEX).is_file():
        return _stored(config, path, device)
    target = _load(config, device)
    identity = identify_target(target)
    if path.is_dir():
        check_answers_target(load_answers(path).manifest, identity)
    split = load_split(config.data, target.vocab_size, _max_len(config, target))
    return OnlineMaterials(target, identity, split, machine(target))


def _stored(config: TrainConfig, path: Path, device: torch.device) -> StoredMaterials:
    store = FeatureStore.open(path)
    ends = load_ends(config.target.path, dtype=config.target.dtype, device=device)
    store.check_ends(ends)
    rows = {name: store.rows(name) for name in store.splits()}
    held_out = rows.get("held_out")
    limit = config.data.num_validation
    split = split_rows(
        config.data,
        rows["train"][: config.data.max_rows],
        None if held_out is None else held_out[:limit],
        _max_len(config, ends),
    )
    where = machine(ends)
    return StoredMaterials(ends, store.index.target, split, where, store, config)


def _load(config: TrainConfig, device: torch.device) -> HFTarget:
    target = load_target(
        config.target.path,
        dtype=config.target.dtype,
        device=device,
        quantization=config.target.quantization,
    )
    target.model.requires_grad_(False)
    return target


def _max_len(config: TrainConfig, target: Any) -> int:
    max_len = config.data.max_len or target.max_context_len
    if max_len > target.max_context_len:
        raise ValueError(
            f"config data.max_len is {max_len} but the target's context is only "
            f"{target.max_context_len}"
        )
    # A packed line holds any row whole.
    return int(min(max_len, config.data.pack_len or max_len))


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Noise as a function of these numbers alone, so that there is no generator to save."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        torch.manual_seed(seed)
        yield


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]


def most_frequent(rows: Sequence[AnswerRow], size: int, vocab_size: int) -> Tensor:
    """The `size` most frequent ids [size] of the answers, ascending; ties go to lower ids."""
    counts = _counts(rows, vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values


def coverage(rows: Sequence[AnswerRow], tokens: Tensor, vocab_size: int) -> float | None:
    """Share of the answers' tokens that are among these ids; None without rows."""
    counts = _counts(rows, vocab_size)
    return (counts[tokens].sum() / counts.sum()).item() if rows else None


def _counts(rows: Sequence[AnswerRow], vocab_size: int) -> Tensor:
    written = [
        token for row in rows for start, end in row.answers for token in row.tokens[start:end]
    ]
    return torch.bincount(torch.tensor(written, dtype=torch.long), minlength=vocab_size)
