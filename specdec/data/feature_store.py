"""Reading a feature store: any row at any time, by as many processes as like to."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import differences, hash_of_ends, identify_target
from specdec.data.answers import AnswerRow
from specdec.data.feature_format import (
    Counts,
    FeatureIndex,
    Shard,
    TopLogits,
    logit_places,
    read_index,
)
from specdec.targets.partial import TargetEnds


@dataclass(frozen=True, eq=False)
class StoredRow:
    """The stored features of n tokens of a row, P of which have logits."""

    tokens: Tensor  # [n] int64
    hidden: dict[int, Tensor]  # tap -> [n, H], bfloat16 or float32
    places: Tensor  # [P] int64: their next token is an answer's
    logits: TopLogits | None  # of these places; None in a store without


@dataclass(frozen=True, eq=False)
class _Entry:
    """A row, and where it starts in its file."""

    row: AnswerRow
    file: Any
    first_token: int
    first_place: int


class FeatureStore:
    """A folder that `specdec features` wrote; `open` opens one.

    Files are mapped, not read: opening takes no memory to speak of beyond the rows' tokens. Open a
    store in every process that reads it.
    """

    def __init__(self, folder: Path, index: FeatureIndex) -> None:
        self.folder, self.index, self.layout = folder, index, index.layout
        self._entries: dict[str, dict[str, _Entry]] = {}  # by split, then by id

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """Open a finished store, whose files are all there and of the right size."""
        where = Path(folder).expanduser()
        store = cls(where, read_index(where))
        if not store.index.is_complete:
            raise ValueError(
                f"{str(where)!r} is not finished; give the command that began it again, it goes on"
            )
        for path, shard in store._shards():
            if not path.is_file():
                raise FileNotFoundError(
                    f"{str(path)!r} is missing; copy it again, or give the command that made the "
                    "store again: finished files are kept"
                )
            size = path.stat().st_size
            if size != shard.bytes:
                raise _damaged(path, f"it has {size:,} bytes, not {shard.bytes:,}")
        return store

    def verify(self) -> None:
        """Read every file whole and refuse one whose hash differs."""
        for path, shard in self._shards():
            if file_hash(path) != shard.sha256:
                raise _damaged(path, "its content is not what was written")

    def check_target(self, identity: TargetIdentity) -> None:
        """Refuse another target than the one whose features these are."""
        known, where = self.index.target, repr(str(self.folder))
        for fact, ours, theirs in differences(known, identity, where, "specdec features"):
            raise self._other_target(fact, ours, theirs)

    def check_ends(self, ends: TargetEnds) -> None:
        """Refuse the ends of another target than the one whose features these are."""
        ours, theirs = self.index.ends, hash_of_ends(ends.model)
        if None not in (ours, theirs) and ours != theirs:
            raise self._other_target("embedding or projection", ours, theirs)
        self.check_target(identify_target(ends))

    def check_taps(self, taps: Sequence[int]) -> None:
        """Refuse taps that are not stored."""
        for tap in taps:
            if tap not in self.layout.taps:
                raise ValueError(
                    f"{str(self.folder)!r} holds the taps {list(self.layout.taps)} but not {tap}; "
                    f"extract the features again with --taps {','.join(map(str, taps))}, or train "
                    "beside the target"
                )

    def splits(self) -> tuple[str, ...]:
        """List the names of the splits."""
        return tuple(self.index.splits)

    def rows(self, split: str) -> list[AnswerRow]:
        """Read the rows of a split, in the order of their file; no two of a store share an id."""
        return [entry.row for entry in self._read(split).values()]

    def get(
        self, row_id: str, taps: Sequence[int] | None = None, max_len: int | None = None
    ) -> StoredRow:
        """Read what is stored of a row, or of its first `max_len` tokens."""
        wanted = self.layout.taps if taps is None else tuple(taps)
        self.check_taps(wanted)
        entry = self._entry(row_id)
        row = entry.row if max_len is None else entry.row.cut(max_len)
        places = logit_places(row)
        tokens = slice(entry.first_token, entry.first_token + len(row.tokens))
        span = slice(entry.first_place, entry.first_place + len(places))
        return StoredRow(
            torch.tensor(row.tokens),
            {tap: entry.file.get_slice(f"hidden.{tap}")[tokens] for tap in wanted},
            torch.tensor(places, dtype=torch.long),
            self._logits(entry.file, span),
        )

    def _logits(self, file: Any, places: slice) -> TopLogits | None:
        if not self.layout.top_k:
            return None
        values = file.get_slice("top_logits")[places]
        if self.layout.top_k == self.layout.vocab_size:
            return TopLogits(values, None, None)
        ids = file.get_slice("top_ids")[places].long()
        return TopLogits(values, ids, file.get_slice("rest")[places])

    def _entry(self, row_id: str) -> _Entry:
        for split in self.splits():
            if row_id in self._read(split):
                return self._read(split)[row_id]
        raise KeyError(f"{str(self.folder)!r} has no row {row_id!r}")

    def _read(self, split: str) -> dict[str, _Entry]:
        """Find where the rows of a split are."""
        if split not in self.index.splits:
            raise ValueError(
                f"{str(self.folder)!r} has no split {split!r}, only {', '.join(self.splits())}"
            )
        if split not in self._entries:
            self._entries[split] = {
                entry.row.id: entry
                for shard in self.index.splits[split].shards
                for entry in self._entries_of(shard)
            }
        return self._entries[split]

    def _entries_of(self, shard: Shard) -> Iterator[_Entry]:
        file = self._opened(shard)
        names = file.get_tensor("row_names").numpy().tobytes().splitlines()
        lens = file.get_tensor("row_lens").tolist()
        num_answers = file.get_tensor("answer_counts").tolist()
        spans = [cast(tuple[int, int], tuple(s)) for s in file.get_tensor("answers").tolist()]
        tokens = file.get_tensor("tokens").tolist()
        token = span = place = 0
        for name, length, count in zip(names, lens, num_answers, strict=True):
            row = AnswerRow(
                tuple(tokens[token : token + length]),
                tuple(spans[span : span + count]),
                *json.loads(name),
            )
            yield _Entry(row, file, token, place)
            token, span, place = token + length, span + count, place + len(logit_places(row))

    def _opened(self, shard: Shard) -> Any:
        """Map a file, whose tensors are then read where they are asked for."""
        path = self.folder / shard.file
        try:
            file: Any = safe_open(str(path), "pt")
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        spans, name_bytes = (shapes.get(name, [0])[0] for name in ("answers", "row_names"))
        counts = Counts(shard.rows, shard.tokens, spans, shard.answer_tokens, name_bytes)
        promised = self.layout.tensors(counts)
        if shapes != {name: list(shape) for name, (_, shape) in promised.items()}:
            raise _damaged(path, "it does not hold the tensors that the index promises")
        return file

    def _shards(self) -> Iterator[tuple[Path, Shard]]:
        for split in self.index.splits.values():
            for shard in split.shards:
                yield self.folder / shard.file, shard

    def _other_target(self, fact: str, ours: object, theirs: object) -> ValueError:
        name = self.index.target.name or "a target"
        return ValueError(
            f"{str(self.folder)!r} holds the features of another target: its {fact} is "
            f"{str(ours)[:12]}, not {str(theirs)[:12]} (it was made with {name}); train for that "
            "target, or extract the features of this one"
        )


def file_hash(path: Path) -> str:
    """Hash a file's content with SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} is damaged ({reason}); copy it again, or remove it and give the command "
        "that made the store again: the other files are kept"
    )
