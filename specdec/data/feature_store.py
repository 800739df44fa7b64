"""Reading a feature store: any row at any time, by as many processes as like to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.checkpoints.head import TargetIdentity
from specdec.checkpoints.identity import differences, hash_of_ends, identify_target
from specdec.data.answers import AnswerRow
from specdec.data.feature_index import FeatureIndex, Shard, read_index
from specdec.data.feature_layout import logit_places
from specdec.data.shard_file import Entry, ShardFile, check_content, check_size
from specdec.data.top_logits import TopLogits
from specdec.targets.ends import TargetEnds


@dataclass(frozen=True, eq=False)
class StoredRow:
    """What is stored of n tokens of a row.

    Attributes:
        tokens: [n] int64.
        hidden: tap -> [n, H], bfloat16 or float32.
        places: [P] int64, the places that logits are for: the next token is an answer's.
        logits: of these places; None in a store without.
    """

    tokens: Tensor
    hidden: dict[int, Tensor]
    places: Tensor
    logits: TopLogits | None


class FeatureStore:
    """A folder that `specdec features` wrote.

    Files are mapped, not read: opening takes no memory to speak of beyond the rows' tokens. Open a
    store in every process that reads it.

    Attributes:
        folder: of the store.
        index: see `FeatureIndex`.
    """

    def __init__(self, folder: Path, index: FeatureIndex) -> None:
        self.folder, self.index, self.layout = folder, index, index.layout
        self._files: dict[str, ShardFile] = {}
        self._entries: dict[str, Entry] = {}
        self._splits: dict[str, list[AnswerRow]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """A finished store, whose files are all there and of the right size.

        Raises:
            FileNotFoundError: no store, or one of its files is missing.
            ValueError: it is not finished, or a file is damaged.
        """
        where = Path(folder).expanduser()
        index = read_index(where)
        if not index.is_complete:
            raise ValueError(
                f"{str(where)!r} is not finished; give the command that began it again, it goes on"
            )
        for split in index.splits.values():
            for shard in split.shards:
                check_size(where / shard.file, shard)
        return cls(where, index)

    def verify(self) -> None:
        """Read every file whole and compare its hash.

        Raises:
            ValueError: a file is damaged.
        """
        for split in self.index.splits.values():
            for shard in split.shards:
                check_content(self.folder / shard.file, shard)

    def check_target(self, identity: TargetIdentity) -> None:
        """Refuse another target than the one whose features these are.

        Raises:
            ValueError: the first fact that differs.
        """
        known, where = self.index.target, repr(str(self.folder))
        for fact, ours, theirs in differences(known, identity, where, "specdec features"):
            raise _other_target(self.folder, known, fact, ours, theirs)

    def check_ends(self, ends: TargetEnds) -> None:
        """Refuse the ends of another target than the one whose features these are.

        Raises:
            ValueError: the first fact that differs.
        """
        ours, theirs = self.index.ends, hash_of_ends(ends.model)
        if None not in (ours, theirs) and ours != theirs:
            fact = "embedding or projection"
            raise _other_target(self.folder, self.index.target, fact, ours, theirs)
        self.check_target(identify_target(ends))

    def check_taps(self, taps: Sequence[int]) -> None:
        """Refuse taps that are not stored.

        Raises:
            ValueError: one that is not.
        """
        for tap in taps:
            if tap not in self.layout.taps:
                raise ValueError(
                    f"{str(self.folder)!r} holds the taps {list(self.layout.taps)} but not {tap}; "
                    f"extract the features again with --taps {','.join(map(str, taps))}, or train "
                    "beside the target"
                )

    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.index.splits)

    def rows(self, split: str) -> list[AnswerRow]:
        """The rows of a split, in the order of their file; no two of a store share an id.

        Raises:
            ValueError: no such split.
        """
        if split not in self.index.splits:
            raise ValueError(
                f"{str(self.folder)!r} has no split {split!r}, only {', '.join(self.splits())}"
            )
        if split not in self._splits:
            entries = [
                entry
                for shard in self.index.splits[split].shards
                for entry in self._file(shard).entries()
            ]
            self._entries.update((entry.row.id, entry) for entry in entries)
            self._splits[split] = [entry.row for entry in entries]
        return self._splits[split]

    def get(
        self, row_id: str, taps: Sequence[int] | None = None, max_len: int | None = None
    ) -> StoredRow:
        """What is stored of a row.

        Args:
            row_id: see `rows`.
            taps: to read; None for all.
            max_len: tokens, for a row that was cut.

        Raises:
            KeyError: no such row.
            ValueError: a tap that is not stored, or a damaged file.
        """
        wanted = self.layout.taps if taps is None else tuple(taps)
        self.check_taps(wanted)
        entry = self._entry(row_id)
        row = entry.row if max_len is None else entry.row.cut(max_len)
        places = logit_places(row)
        first_token, first_place = entry.first_token, entry.first_place
        tokens = slice(first_token, first_token + len(row.tokens))
        return StoredRow(
            torch.tensor(row.tokens),
            {tap: entry.file.hidden(tap, tokens) for tap in wanted},
            torch.tensor(places, dtype=torch.long),
            entry.file.logits(slice(first_place, first_place + len(places))),
        )

    def _entry(self, row_id: str) -> Entry:
        if row_id not in self._entries:
            for split in self.splits():
                self.rows(split)
        if row_id not in self._entries:
            raise KeyError(f"{str(self.folder)!r} has no row {row_id!r}")
        return self._entries[row_id]

    def _file(self, shard: Shard) -> ShardFile:
        if shard.file not in self._files:
            self._files[shard.file] = ShardFile(self.folder / shard.file, shard, self.layout)
        return self._files[shard.file]


def _other_target(
    folder: Path, known: TargetIdentity, fact: str, ours: object, theirs: object
) -> ValueError:
    return ValueError(
        f"{str(folder)!r} holds the features of another target: its {fact} is "
        f"{str(ours)[:12]}, not {str(theirs)[:12]} (it was made with {known.name or 'a target'}); "
        "train for that target, or extract the features of this one"
    )
