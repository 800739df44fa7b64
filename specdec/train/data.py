"""Which rows are trained on, and which are held out."""

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
