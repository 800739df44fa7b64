"""`features.json`: what is in a feature store, whose it is, and how it was made."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec.checkpoints.folder import json_bytes, read_json
from specdec.checkpoints.head import TargetIdentity
from specdec.data.feature_layout import FeatureLayout
from specdec.data.tap_names import TAP_CONVENTION

INDEX, SCHEMA = "features.json", "specdec.features/1"


@dataclass(frozen=True)
class Shard:
    """A file of a store.

    Attributes:
        file: its name in the store's folder.
        rows: in it.
        tokens: in it.
        answer_tokens: of them, those that logits are for.
        bytes: of the file.
        sha256: of the file.
    """

    file: str
    rows: int
    tokens: int
    answer_tokens: int
    bytes: int
    sha256: str


@dataclass
class SplitRecord:
    """The rows of one split.

    Attributes:
        rows: that are stored, or will be.
        tokens: of these rows.
        cut: rows that were longer than the store's `max_len`.
        dropped: rows without an answer token within `max_len`.
        shards: finished, in the order of the rows.
    """

    rows: int
    tokens: int
    cut: int
    dropped: int
    shards: list[Shard] = field(default_factory=list)


@dataclass
class FeatureIndex:
    """The content of `features.json`.

    Attributes:
        layout: what is kept of every token.
        target: whose view it is.
        ends: hash of its embedding and vocabulary projection, see `hash_of_ends`.
        settings: that the layout does not tell: "max_len", "batch_tokens", "shard_bytes", "dtype"
            of the target.
        source: what the rows came from: "rows", a hash of them, and "answers", the manifest of
            `specdec regenerate` where there is one.
        splits: by name.
        is_complete: every row is stored.
        provenance: command, commit, versions, machine and time of the first run.
    """

    layout: FeatureLayout
    target: TargetIdentity
    ends: str | None
    settings: dict[str, Any]
    source: dict[str, Any]
    splits: dict[str, SplitRecord]
    is_complete: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a JSON file."""
        whole = asdict(self)
        return json_bytes({"schema": SCHEMA, "tap_convention": TAP_CONVENTION, **whole})

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one it goes on from."""
        whole = asdict(self)
        for name in ("name", "facts", "magnitudes"):  # a folder's, and what is compared by itself
            del whole["target"][name]
        same = {key: whole[key] for key in ("layout", "target", "ends", "settings")}
        return {**same, "rows": self.source["rows"]}


def read_index(folder: Path) -> FeatureIndex:
    """The index of a store, finished or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is no feature store, it has no {INDEX}; make one with "
            "`specdec features`"
        )
    given = read_json(folder / INDEX)
    schema, convention = given.pop("schema", None), given.pop("tap_convention", None)
    if schema != SCHEMA or convention != TAP_CONVENTION:
        raise ValueError(
            f"{str(folder / INDEX)!r} is of the schema {schema!r} with the tap convention "
            f"{convention!r}, but only {SCHEMA!r} with {TAP_CONVENTION!r} can be read; extract "
            "the features again"
        )
    try:
        layout = given.pop("layout")
        splits = {
            name: SplitRecord(**{**split, "shards": [Shard(**each) for each in split["shards"]]})
            for name, split in given.pop("splits").items()
        }
        return FeatureIndex(
            layout=FeatureLayout(**{**layout, "taps": tuple(layout["taps"])}),
            target=TargetIdentity(**given.pop("target")),
            splits=splits,
            **given,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(folder / INDEX)!r} is damaged ({error}); copy it again, or extract the features "
            "again"
        ) from error
