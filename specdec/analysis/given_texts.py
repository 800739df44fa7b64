"""Texts that are there already: answers of `specdec regenerate`, a JSONL file, or plain text."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from specdec.analysis.texts import Text
from specdec.checkpoints import identify_target
from specdec.data.answers import AnswerRow, read_rows
from specdec.data.answers_folder import MANIFEST, check_answers_target, load_answers
from specdec.files import parse_json
from specdec.interfaces import Target


def read_texts(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    """Read up to `num` texts, each cut to `max_new_tokens` new ones.

    Args:
        path: a folder of `specdec regenerate` (its held-out rows, or all rows where none are);
            a `.jsonl` of {"tokens", "answers"}, or of {"prompt", "answer"} as plain text; or a
            file of plain text, which is cut into pieces that follow each other.
        target: whose tokenizer reads text.
        num: texts, at most.
        max_new_tokens: that the loop is thought to be allowed.

    Raises:
        FileNotFoundError: no such path, or a run that has not finished.
        ValueError: another target's answers, a line that cannot be read, or no text at all.
    """
    if path.is_dir():
        texts = _from_folder(path, target, num, max_new_tokens)
    elif not path.is_file():
        raise FileNotFoundError(f"--text {str(path)!r} is not there; give a file or a folder")
    elif path.suffix == ".jsonl":
        texts = _from_lines(path, target, num, max_new_tokens)
    else:
        texts = _from_prose(path, target, num, max_new_tokens)
    if not texts:
        raise ValueError(
            f"--text {str(path)!r} holds no text of at least one token behind a prompt; give some"
        )
    return texts


def _from_folder(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(
            f"--text {str(path)!r} holds no {MANIFEST}; give a folder that specdec regenerate wrote"
        )
    answers = load_answers(path)
    check_answers_target(answers.manifest, identify_target(target))
    split = "held_out" if answers.num_rows("held_out") else "train"
    rows = answers.rows(split, target.vocab_size, num)
    return _from_rows(rows, target, num, max_new_tokens)


def _from_lines(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    objects = _objects(path)
    first = next(objects, None)
    if first is None:
        return []
    if "tokens" in first[1]:
        return _from_rows(read_rows(path, target.vocab_size, num), target, num, max_new_tokens)
    texts: list[Text] = []
    for number, given in chain([first], objects):
        prompt, answer = given.get("prompt"), given.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError(
                f'{path}, line {number}: a row must be an object with "prompt" and "answer", both '
                'text, or with "tokens" and "answers"'
            )
        said = _ids(answer, target, special=False)
        texts += _cut(_ids(prompt, target), said, target, max_new_tokens)
        if len(texts) == num:
            break
    return texts


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their numbers; empty lines are passed over."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                given = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: this is no JSON ({error})") from error
            if not isinstance(given, dict):
                raise ValueError(f"{path}, line {number}: a row must be a JSON object")
            yield number, given


def _from_rows(
    rows: Iterator[AnswerRow], target: Target, num: int, max_new_tokens: int
) -> list[Text]:
    texts: list[Text] = []
    for row in rows:
        if len(texts) == num:
            break
        start, end = max(row.answers, key=lambda answer: answer[1] - answer[0])
        # Every prompt holds a token: of an answer to nothing, its first.
        start = max(start, 1)
        texts += _cut(row.tokens[:start], row.tokens[start:end], target, max_new_tokens)
    return texts


def _from_prose(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    ids = _ids(path.read_text(encoding="utf-8-sig"), target)
    texts: list[Text] = []
    # Of a piece as long as the context no prompt would be left.
    size = min(max_new_tokens, target.max_context_len - 1)
    for start in range(1, len(ids), size):
        if len(texts) == num:
            break
        end = min(start + size, len(ids))
        first = max(0, end - target.max_context_len)
        texts.append(Text(ids[first:start], ids[start:end], size))
    return texts


def _cut(
    prompt: Sequence[int], answer: Sequence[int], target: Target, max_new_tokens: int
) -> list[Text]:
    """One text, or none where nothing is left of its prompt or its answer."""
    limit = min(max_new_tokens, target.max_context_len - len(prompt))
    if limit < 1 or not prompt or not answer:
        return []
    return [Text(list(prompt), list(answer[:limit]), limit)]


def _ids(text: str, target: Target, *, special: bool = True) -> list[int]:
    tokenizer: Any = target.tokenizer
    if tokenizer is None:
        raise ValueError("--text holds text but the target has no tokenizer; give token ids")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
