"""The texts that acceptance is worked out along."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from specdec.checkpoints import identify_target
from specdec.common.files import parse_json
from specdec.data.answers import MANIFEST, AnswerRow, check_answers_target, load_answers, read_rows
from specdec.engine.decode import generate_baseline
from specdec.engine.interfaces import Target
from specdec.sampling.config import SamplingConfig


@dataclass(frozen=True)
class Text:
    """A prompt and what came after it: what the loop would emit.

    Attributes:
        prompt: ids, at least one.
        tokens: ids that it went on with, at least one.
        max_tokens: that it was allowed, as the loop counts them.
    """

    prompt: list[int]
    tokens: list[int]
    max_tokens: int


def target_answers(
    target: Target,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Text]:
    """What a target says to prompts, by plain decoding.

    Args:
        target: the model.
        prompts: ids.
        sampling: of all of them; prompt i draws from seed + i.
        max_new_tokens: of each.
        batch_size: rows decoded together.

    Raises:
        ValueError: a prompt that cannot be decoded.
        KeyboardInterrupt: while it decoded.
    """
    results = generate_baseline(
        target, prompts, sampling, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if any(result.finish_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    room = [min(max_new_tokens, target.max_context_len - len(prompt)) for prompt in prompts]
    return [
        Text(list(prompt), result.tokens, limit)
        for prompt, result, limit in zip(prompts, results, room, strict=True)
    ]


def seeded(sampling: SamplingConfig, seed: int, index: int) -> SamplingConfig:
    """The settings of prompt `index`, which draws its own numbers, as in a bench."""
    return replace(sampling, seed=seed + index)


def check_texts(texts: Sequence[Text], target: Target) -> None:
    """Refuse texts that the target cannot have written.

    Raises:
        ValueError: no text, an empty one, one longer than the context or than it was allowed, or
            an id outside the vocabulary.
    """
    if not texts:
        raise ValueError("texts is empty but must hold at least one text")
    for index, text in enumerate(texts):
        if not text.prompt or not text.tokens:
            raise ValueError(
                f"text {index} has {len(text.prompt)} prompt tokens and {len(text.tokens)} new "
                "ones but needs at least one of each"
            )
        if len(text.tokens) > text.max_tokens:
            raise ValueError(
                f"text {index} has {len(text.tokens)} new tokens but was allowed "
                f"{text.max_tokens}; raise max_tokens"
            )
        num_tokens = len(text.prompt) + len(text.tokens)
        if num_tokens > target.max_context_len:
            raise ValueError(
                f"text {index} has {num_tokens} tokens but the target's context holds "
                f"{target.max_context_len}; cut it"
            )
        wrong = [t for t in (*text.prompt, *text.tokens) if not 0 <= t < target.vocab_size]
        if wrong:
            raise ValueError(
                f"text {index} holds token {wrong[0]} but ids of this target are in "
                f"[0, {target.vocab_size}); was it written by another target?"
            )


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
