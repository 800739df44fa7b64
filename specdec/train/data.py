"""The rows of a data file: dialogues, and which of their tokens the target wrote."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.train.config import DataConfig

# A root and one token to draft behind it.
MIN_ANSWER_LEN = 2


@dataclass(frozen=True)
class AnswerRow:
    """One dialogue.

    Attributes:
        tokens: of the whole dialogue, in the target's vocabulary.
        answers: [start, end) of every answer that the target wrote, in order.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the target wrote."""
        return sum(end - start for start, end in self.answers)

    def cut(self, max_len: int) -> "AnswerRow":
        """The first `max_len` tokens."""
        spans = ((start, min(end, max_len)) for start, end in self.answers if start < max_len)
        return AnswerRow(self.tokens[:max_len], tuple(spans))


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


def read_rows(path: Path, vocab_size: int, max_rows: int | None = None) -> Iterator[AnswerRow]:
    """Rows of a JSONL file, each `{"tokens": [...], "answers": [[start, end), ...]}`.

    Other keys are ignored.

    Args:
        path: of the file.
        vocab_size: every token id is below it.
        max_rows: stop after this many; None for all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such row, by its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path {str(path)!r} is not a file; give a JSONL file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if max_rows is not None and number > max_rows:
                return
            try:
                yield _row(json.loads(line), vocab_size)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _row(given: Any, vocab_size: int) -> AnswerRow:
    if not isinstance(given, dict) or not {"tokens", "answers"} <= given.keys():
        raise ValueError('a row must be an object with "tokens" and "answers"')
    tokens, spans = given["tokens"], given["answers"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of token ids")
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"token id {wrong} is outside the target's vocabulary of {vocab_size}; the answers "
            "must be written with the target's own tokenizer"
        )
    if not isinstance(spans, list) or not spans:
        raise ValueError("answers is empty; every row needs at least one [start, end) span")
    before = 0
    for span in spans:
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise ValueError(f"answer {span!r} must be a pair of token indices [start, end)")
        if not before <= span[0] < span[1] <= len(tokens):
            raise ValueError(
                f"answer {span} must be a non-empty span behind the one before and within the "
                f"row's {len(tokens)} tokens"
            )
        before = span[1]
    return AnswerRow(tuple(tokens), tuple((start, end) for start, end in spans))


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
