"""The rows that a feature store is made of, and which file each goes to."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.checkpoints.head import TargetIdentity
from specdec.data.answers import AnswerRow, read_rows
from specdec.data.answers_folder import check_answers_target, load_answers
from specdec.data.feature_layout import Counts, FeatureLayout
from specdec.data.query import SPLITS


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split.

    Attributes:
        rows: in the order of their file, no longer than the store's `max_len`, with an answer.
        cut: how many of them were longer.
        dropped: rows whose answers all lie behind `max_len`.
    """

    rows: list[AnswerRow]
    cut: int
    dropped: int


def read_splits(
    path: Path, identity: TargetIdentity, vocab_size: int, max_len: int
) -> tuple[dict[str, SplitRows], dict[str, Any] | None]:
    """The rows of a folder of answers, or of a JSONL file, which is all for training.

    Rows that share an id are told apart by a number behind it.

    Args:
        path: of the folder or file.
        identity: of the target that is to read them.
        vocab_size: of this target.
        max_len: in tokens; longer rows are cut.

    Returns:
        The rows of every split, and the folder's manifest; None for a file.

    Raises:
        FileNotFoundError: no such folder or file, or a folder that is not finished.
        ValueError: another target wrote the answers, a line is no row, or there are no rows.
    """
    where, manifest = path.expanduser(), None
    files = {SPLITS[0]: where}
    if where.is_dir():
        answers = load_answers(where)
        manifest = answers.manifest
        check_answers_target(manifest, identity)
        files = {split: answers.path(split) for split in SPLITS}
    seen: Counter[str] = Counter()
    splits = {}
    for split, file in files.items():
        given = list(read_rows(file, vocab_size))
        kept = [row for row in (each.cut(max_len) for each in given) if row.answers]
        splits[split] = SplitRows(
            [_named(row, seen) for row in kept],
            sum(len(row.tokens) > max_len for row in given),
            len(given) - len(kept),
        )
    if not any(split.rows for split in splits.values()):
        raise ValueError(f"{str(path)!r} holds no row with an answer within {max_len} tokens")
    return splits, manifest


def _named(row: AnswerRow, seen: Counter[str]) -> AnswerRow:
    """The row with an id of its own."""
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id} ({seen[row.id]})"
    seen[name] += 1
    return replace(row, id=name)


def fingerprint(splits: dict[str, SplitRows]) -> str:
    """A hash of all rows."""
    whole = hashlib.sha256()
    for split, found in splits.items():
        whole.update(split.encode())
        for row in found.rows:
            whole.update(repr(row).encode())
    return whole.hexdigest()


def plan_shards(
    rows: Sequence[AnswerRow], layout: FeatureLayout, shard_bytes: int
) -> list[list[AnswerRow]]:
    """Rows in files of at most so many bytes, unless a single row has more."""
    shards: list[list[AnswerRow]] = []
    room = 0
    for row in rows:
        size = layout.num_bytes(Counts.of([row]))
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(row)
        room -= size
    return shards
