"""What a run is made of: rows, and the target or what is stored of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from specdec.bench.provenance import machine
from specdec.checkpoints import TargetIdentity, identify_target
from specdec.data.answers_folder import check_answers_target, load_answers
from specdec.data.feature_index import INDEX
from specdec.data.feature_store import FeatureStore
from specdec.targets.ends import load_ends
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.train.config import TrainConfig
from specdec.train.data import Split, load_split, split_rows
from specdec.train.source import OnlineSource, Source
from specdec.train.stored import StoredSource
from specdec.train.trainee import Trainee, trained_dtype


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
