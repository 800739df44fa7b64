"""The texts that acceptance is worked out along."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from specdec.bench.config import BenchConfig
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.bench.workloads import Progress, unfold_turns
from specdec.checkpoints import identify_target
from specdec.common.messages import BenchPrompt
from specdec.common.records import read_objects
from specdec.data.answers import MANIFEST, AnswerRow, check_answers_target, load_answers, read_rows
from specdec.engine.decode import generate_baseline
from specdec.engine.interfaces import Target
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget


@dataclass(frozen=True)
class Text:
    """A prompt and the tokens behind it: what the loop would emit.

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
    """The target's answers to prompts by plain decoding; prompt i draws from seed + i."""
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


def prompt_ids(
    config: BenchConfig, target: HFTarget, progress: Progress
) -> tuple[list[BenchPrompt], list[list[int]]]:
    """The prompts of a bench, later turns of a conversation unfolded, and their ids."""
    prompts = load_prompts(**config.prompts.model_dump())
    prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
    return prompts, encode_prompts(prompts, target)


def check_texts(texts: Sequence[Text], target: Target) -> None:
    """Refuse texts that the target cannot have written."""
    if not texts:
        raise ValueError("texts is empty but must hold at least one text")
    room, size = target.max_context_len, target.vocab_size
    for index, text in enumerate(texts):
        old, new = len(text.prompt), len(text.tokens)
        wrong = next((t for t in (*text.prompt, *text.tokens) if not 0 <= t < size), None)
        for is_fault, fault in (
            (not old or not new, f"has {old} prompt tokens and {new} new ones; give one of each"),
            (
                new > text.max_tokens,
                f"has {new} new tokens but was allowed {text.max_tokens}; raise max_tokens",
            ),
            (
                old + new > room,
                f"has {old + new} tokens but the target's context holds {room}; cut it",
            ),
            (
                wrong is not None,
                f"holds token {wrong} but ids are in [0, {size}); give texts of this target",
            ),
        ):
            if is_fault:
                raise ValueError(f"text {index} {fault}")


def read_texts(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    """Read up to `num` texts, each cut to `max_new_tokens` new ones."""
    if path.is_dir():
        found = _from_folder(path, target, num, max_new_tokens)
    elif not path.is_file():
        raise FileNotFoundError(f"--text {str(path)!r} is not there; give a file or a folder")
    elif path.suffix == ".jsonl":
        found = _from_lines(path, target, num, max_new_tokens)
    else:
        found = _from_prose(path, target, max_new_tokens)
    texts = list(islice(found, num))
    if not texts:
        raise ValueError(
            f"--text {str(path)!r} holds no text of at least one token behind a prompt; give some"
        )
    return texts


def _from_folder(path: Path, target: Target, num: int, max_new_tokens: int) -> Iterator[Text]:
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(
            f"--text {str(path)!r} holds no {MANIFEST}; give a folder that specdec regenerate wrote"
        )
    manifest = load_answers(path)
    check_answers_target(manifest, identify_target(target))
    file = path / ("held_out.jsonl" if manifest.counts.held_out.rows else "train.jsonl")
    return _from_rows(read_rows(file, target.vocab_size, num), target, max_new_tokens)


def _from_lines(path: Path, target: Target, num: int, max_new_tokens: int) -> Iterator[Text]:
    rows = list(read_objects(path))
    if rows and "tokens" in rows[0]:
        yield from _from_rows(read_rows(path, target.vocab_size, num), target, max_new_tokens)
        return
    for number, row in enumerate(rows, 1):
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError(
                f'{path}, row {number}: a row must be an object with "prompt" and "answer", both '
                'text, or with "tokens" and "answers"'
            )
        said = _ids(answer, target, special=False)
        yield from _cut(_ids(prompt, target), said, target, max_new_tokens)


def _from_rows(rows: Iterable[AnswerRow], target: Target, max_new_tokens: int) -> Iterator[Text]:
    for row in rows:
        start, end = max(row.answers, key=lambda answer: answer[1] - answer[0])
        # Every prompt holds a token: of an answer to nothing, its first.
        start = max(start, 1)
        yield from _cut(row.tokens[:start], row.tokens[start:end], target, max_new_tokens)


def _from_prose(path: Path, target: Target, max_new_tokens: int) -> Iterator[Text]:
    ids = _ids(path.read_text(encoding="utf-8-sig"), target)
    # Of a piece as long as the context no prompt would be left.
    size = min(max_new_tokens, target.max_context_len - 1)
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        yield Text(ids[max(0, end - target.max_context_len) : start], ids[start:end], size)


def _cut(
    prompt: Sequence[int], answer: Sequence[int], target: Target, max_new_tokens: int
) -> Iterator[Text]:
    """One text, or none where nothing is left of its prompt or its answer."""
    limit = min(max_new_tokens, target.max_context_len - len(prompt))
    if limit >= 1 and prompt and answer:
        yield Text(list(prompt), list(answer[:limit]), limit)


def _ids(text: str, target: Target, *, special: bool = True) -> list[int]:
    tokenizer: Any = target.tokenizer
    if tokenizer is None:
        raise ValueError("--text holds text but the target has no tokenizer; give token ids")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
