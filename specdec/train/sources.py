"""Batches of a run: what the target makes of the rows, computed beside the drafter or stored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.checkpoints import TargetIdentity, identify_target
from specdec.common.provenance import machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers
from specdec.data.feature_store import INDEX, FeatureStore, StoredRow
from specdec.drafters.training import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_ends, load_target
from specdec.train.config import TrainConfig
from specdec.train.data import Layout, Split, TokenBatch, collate, load_split, padded, split_rows

Lay = Callable[[Sequence[int]], Layout]  # where to put texts of given lengths


class Source(Protocol):
    """Turns rows into what a drafter is trained on."""

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """Return the rows and the target's view of them."""


class OnlineSource:
    """Runs the target on every batch."""

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
    the taps outlive the call; the last one is after the final norm.
    """
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    with torch.no_grad():
        out = target.model(
            input_ids=batch.tokens, output_hidden_states=bool(taps), use_cache=False, **positions
        )
    hidden = {tap: out.hidden_states[tap].to(dtype) for tap in taps}
    return TrainingBatch(**vars(batch), hidden=hidden, target_logits=out.logits.to(dtype))


class StoredSource:
    """Reads what the target made of the rows.

    Batches are those of `OnlineSource` but for what the store rounds: taps in bf16, and the logits
    outside the top k, which are all alike (`TopLogits.dense`). Where a store has no logits, the
    vocabulary projection makes them from the last tap. Places whose next token is no answer's have
    zeros for logits; nothing is learned there.
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
        last = set() if layout.top_k else {layout.num_layers}
        self._read = sorted({*taps, *last})

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """See `Source`."""
        layout, sizes = lay([len(row.tokens) for row in rows]), self.store.layout
        tokens = collate(rows, self.device, layout)
        hidden = {tap: self._zeros(*layout.shape, sizes.hidden_size) for tap in self.taps}
        logits = self._zeros(*layout.shape, sizes.vocab_size)
        for row, (line, first) in zip(rows, layout.places, strict=True):
            stored, end = self._row(row), first + len(row.tokens)
            for tap in self.taps:
                hidden[tap][line, first:end] = stored.hidden[tap].to(self.device, self.dtype)
            logits[line, first + stored.places.to(self.device)] = self._logits(stored)
        return TrainingBatch(**vars(tokens), hidden=hidden, target_logits=logits)

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
        """Return logits [P, V] of a row's places."""
        if stored.logits is not None:
            top = stored.logits.to(self.device)
            return top.dense(self.store.layout.vocab_size, self.dtype)
        assert self._projection is not None
        states = stored.hidden[self.store.layout.num_layers][stored.places]
        weight = next(self._projection.parameters())
        with torch.no_grad():
            logits: Tensor = self._projection(states.to(weight.device, weight.dtype))
        return logits.to(self.device, self.dtype)


@dataclass(frozen=True, eq=False)
class Materials:
    """The target, the rows, and where their features come from.

    Attributes:
        config: configuration of the run.
        target: an `HFTarget`; with a store the `TargetEnds` that heads are built from.
        identity: identity of the target.
        split: rows to train on and to validate on.
        where: the machine and the code, when the run was started.
        store: None where the target runs beside the drafter.
    """

    config: TrainConfig
    target: Any
    identity: TargetIdentity
    split: Split
    where: dict[str, Any]
    store: FeatureStore | None = None

    def source(self, taps: tuple[int, ...], dtype: torch.dtype) -> Source:
        """Make the batches that a drafter with these taps and weights reads."""
        if self.store is None:
            return OnlineSource(self.target, taps, dtype)
        projection = self.target.model.get_output_embeddings()
        return StoredSource(self.store, taps, dtype, self.target.device, projection)

    def whole_target(self) -> HFTarget:
        """Return a target that can decode; with a store it is loaded now."""
        if self.store is None:
            whole: HFTarget = self.target
            return whole
        target = _load(self.config, self.target.device)
        self.store.check_target(identify_target(target))
        return target


def load_materials(config: TrainConfig, device: torch.device) -> Materials:
    """Open the data of a run, and load as much of the target as it needs."""
    path = Path(config.data.path).expanduser()
    if (path / INDEX).is_file():
        store = FeatureStore.open(path)
        target: Any = load_ends(config.target.path, dtype=config.target.dtype, device=device)
        store.check_ends(target)
        held_out = store.rows("held_out") if "held_out" in store.splits() else None
        split = split_rows(
            config.data,
            store.rows("train")[: config.data.max_rows],
            held_out and held_out[: config.data.num_validation],
            _max_len(config, target),
        )
        return Materials(config, target, store.index.target, split, machine(target), store)
    target = _load(config, device)
    identity = identify_target(target)
    if path.is_dir():
        check_answers_target(load_answers(path), identity)
    split = load_split(config.data, target.vocab_size, _max_len(config, target))
    return Materials(config, target, identity, split, machine(target))


def _load(config: TrainConfig, device: torch.device) -> HFTarget:
    chosen = config.target
    target = load_target(
        chosen.path, dtype=chosen.dtype, device=device, quantization=chosen.quantization
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
    """Make noise a function of these numbers alone, so that there is no generator to save."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        torch.manual_seed(seed)
        yield
