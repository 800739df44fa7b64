"""The texts that acceptance is worked out along."""

from collections.abc import Iterator, Sequence
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
from specdec.data.answers import check_answers_target, load_answers, read_rows
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
        old, new, most = len(text.prompt), len(text.tokens), text.max_tokens
        wrong = next((t for t in (*text.prompt, *text.tokens) if not 0 <= t < size), None)
        faults = [
            (not old or not new, f"{old} prompt tokens and {new} new ones; give one of each"),
            (new > most, f"{new} new tokens but was allowed {most}; raise max_tokens"),
            (old + new > room, f"{old + new} tokens but the target's context holds {room}; cut it"),
            (
                wrong is not None,
                f"token {wrong} but ids are in [0, {size}); give texts of this target",
            ),
        ]
        for is_so, fault in faults:
            if is_so:
                raise ValueError(f"text {index} has {fault}")


def read_texts(path: Path, target: Target, num: int, max_new_tokens: int) -> list[Text]:
    """Read up to `num` texts, each cut to `max_new_tokens` new ones."""
    if not path.exists():
        raise FileNotFoundError(f"--text {str(path)!r} is not there; give a file or a folder")
    is_prose = path.is_file() and path.suffix != ".jsonl"
    limits = (path, target, max_new_tokens)
    texts = list(islice(_pieces(*limits) if is_prose else _answers(*limits, num), num))
    if not texts:
        fault = "holds no text of at least one token behind a prompt; give some"
        raise ValueError(f"--text {str(path)!r} {fault}")
    return texts


def _pieces(path: Path, target: Target, max_new_tokens: int) -> Iterator[Text]:
    """Plain text in pieces, each behind what came before."""
    ids = _ids(path.read_text(encoding="utf-8-sig"), target)
    # Of a piece as long as the context no prompt would be left.
    size = min(max_new_tokens, target.max_context_len - 1)
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        yield Text(ids[max(0, end - target.max_context_len) : start], ids[start:end], size)


def _answers(path: Path, target: Target, max_new_tokens: int, num: int) -> Iterator[Text]:
    """Answers behind their prompts, as far as something is left of both."""
    for prompt, answer in _pairs(path, target, num):
        limit = min(max_new_tokens, target.max_context_len - len(prompt))
        if limit > 0 and prompt and answer:
            yield Text(list(prompt), list(answer[:limit]), limit)


def _pairs(path: Path, target: Target, num: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Prompts and answers of a folder that `specdec regenerate` wrote, or of a file of rows."""
    is_folder = path.is_dir()
    if is_folder:
        manifest = load_answers(path)
        check_answers_target(manifest, identify_target(target))
        path = path / ("held_out.jsonl" if manifest.counts.held_out.rows else "train.jsonl")
    if is_folder or "tokens" in next(read_objects(path), {}):
        for each in read_rows(path, target.vocab_size, num):
            start, end = max(each.answers, key=lambda answer: answer[1] - answer[0])
            # Every prompt holds a token: of an answer to nothing, its first.
            start = max(start, 1)
            yield each.tokens[:start], each.tokens[start:end]
        return
    for number, row in enumerate(read_objects(path), 1):
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str):
            rule = 'a row must be an object with "prompt" and "answer", both text, or with "tokens"'
            raise ValueError(f'{path}, row {number}: {rule} and "answers"')
        yield _ids(prompt, target), _ids(answer, target, special=False)


def _ids(text: str, target: Target, *, special: bool = True) -> list[int]:
    tokenizer: Any = target.tokenizer
    if tokenizer is None:
        raise ValueError("--text holds text but the target has no tokenizer; give token ids")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
