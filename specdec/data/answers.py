"""Dialogues as token ids, and which of the tokens the target wrote."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.files import parse_json


@dataclass(frozen=True)
class AnswerRow:
    """One dialogue.

    Attributes:
        tokens: of the whole dialogue, in the target's vocabulary.
        answers: [start, end) of every answer that the target wrote, in order.
        id: of the query it answers; "line N" where the file has none.
        domain: of the query; empty where it is not known.
        temperature: that the answers were sampled at; None where it is not known.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    id: str = ""
    domain: str = ""
    temperature: float | None = None

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the target wrote."""
        return sum(end - start for start, end in self.answers)

    def cut(self, max_len: int) -> "AnswerRow":
        """The first `max_len` tokens."""
        spans = ((start, min(end, max_len)) for start, end in self.answers if start < max_len)
        return replace(self, tokens=self.tokens[:max_len], answers=tuple(spans))


def read_rows(path: Path, vocab_size: int, max_rows: int | None = None) -> Iterator[AnswerRow]:
    """Rows of a JSONL file, each `{"tokens": [...], "answers": [[start, end), ...]}`.

    "id", "domain" and "temperature" are kept; other keys are ignored.

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
                yield _row(parse_json(line), vocab_size, f"line {number}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _row(given: Any, vocab_size: int, name: str) -> AnswerRow:
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
    temperature = given.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        raise ValueError(f"temperature is {temperature!r} but must be a number")
    return AnswerRow(
        tuple(tokens),
        tuple((start, end) for start, end in spans),
        str(given.get("id", name)),
        str(given.get("domain", "")),
        temperature,
    )
