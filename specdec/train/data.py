"""The rows of a data file: dialogues, and which of their tokens the target wrote."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.data.answers import AnswerRow, read_rows
from specdec.train.config import DataConfig

# A root and one token to draft behind it.
MIN_ANSWER_LEN = 2


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to validate on.

    Attributes:
        training: the first rows of the file.
        validation: the last ones; may be empty.
        num_dropped: rows left out because no answer of two tokens fits into `max_len`.
        fingerprint: a short hash of what is kept.
    """

    training: list[AnswerRow]
    validation: list[AnswerRow]
    num_dropped: int
    fingerprint: str


def load_split(config: DataConfig, vocab_size: int, max_len: int) -> Split:
    """Read the file, cut long rows, and split the last ones off for validation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no row, or too few rows.
    """
    path = Path(config.path).expanduser()
    read = [row.cut(max_len) for row in read_rows(path, vocab_size, config.max_rows)]
    rows = [row for row in read if _can_train(row)]
    num_validation = config.num_validation or round((config.validation_fraction or 0) * len(rows))
    if not rows:
        reason = f"none of its {len(read)} rows has an answer of {MIN_ANSWER_LEN} tokens"
        hint = f"{reason} within max_len {max_len}; raise data.max_len" if read else "it is empty"
        raise ValueError(f"{path} holds nothing to train on: {hint}")
    if num_validation >= len(rows):
        raise ValueError(
            f"{path} holds {len(rows)} rows that can be used, and {num_validation} of them would "
            "be for validation; lower data.num_validation or give more rows"
        )
    first = len(rows) - num_validation
    return Split(rows[:first], rows[first:], len(read) - len(rows), _fingerprint(rows))


def _can_train(row: AnswerRow) -> bool:
    return any(end - start >= MIN_ANSWER_LEN for start, end in row.answers)


def _fingerprint(rows: Sequence[AnswerRow]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(repr((row.tokens, row.answers)).encode())
    return whole.hexdigest()[:16]
