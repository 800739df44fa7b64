"""The prompts of a bench: a named source or a file, in an order that its seed decides."""

import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from specdec.common.messages import (
    CONVERSATION_KEYS,
    BenchPrompt,
    Message,
    NoQueryError,
    find_queries,
    read_queries,
    shuffled,
)
from specdec.common.records import (
    DATA_DIR_VARIABLE,
    NamedSource,
    RecordFile,
    Row,
    open_named,
    read_objects,
    sound,
)
from specdec.demo import demo_path
from specdec.engine.interfaces import Target
from specdec.engine.text import encode

HELD_OUT = "held_out"


def load_prompts(
    source: str, num: int, data_dir: str | None = None, seed: int = 0
) -> list[BenchPrompt]:
    """Take up to `num` prompts of a source; the same ones for the same seed.

    A source is a name in `SOURCES` (in `data_dir` or SPECDEC_DATA_DIR, else on the hub), a file of
    records (`find_queries`) or of text, a prompt a line, or a folder that `specdec collect` wrote,
    whose held-out queries are taken. Seed 0 keeps the order of most.
    """
    if source in SOURCES:
        folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        prompts = _read_named(source, Path(folder).expanduser() if folder else None)
    elif Path(source).is_file():
        prompts = list(_read_file(Path(source)))
    elif Path(source).is_dir():
        queries = read_queries(Path(source), HELD_OUT)
        prompts = [BenchPrompt(q.id, q.domain or "collected", q.messages, q.text) for q in queries]
    else:
        raise ValueError(
            f"prompts.source is {source!r} but must be a file, a folder that specdec collect "
            f"wrote, or one of {', '.join(SOURCES)}"
        )
    if not prompts:
        raise ValueError(f"prompts.source {source!r} holds no prompts; give a file with at least 1")
    if empty := [prompt.id for prompt in prompts if prompt.is_empty]:
        raise ValueError(f"prompts.source {source!r}: prompt {empty[0]!r} is empty; remove it")
    if seed or source in ("gsm8k", "sgd", "taskmaster4"):  # others are balanced as they stand
        prompts = shuffled(prompts, seed)
    return prompts[:num]


def render(prompt: BenchPrompt, tokenizer: Any) -> list[Message] | str:
    """Make what `generate` takes: messages if the tokenizer has a chat template, else text."""
    if not prompt.messages:
        return prompt.text
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        return list(prompt.messages)
    return "\n".join(message["content"] for message in prompt.messages)


def encode_prompts(prompts: Sequence[BenchPrompt], target: Target) -> list[list[int]]:
    """Token ids of every prompt; errors as in `encode`."""
    return [encode(render(p, target.tokenizer), target, i) for i, p in enumerate(prompts)]


def _read_file(path: Path) -> Iterator[BenchPrompt]:
    """Read messages up to the last user turn, ShareGPT up to its first one, or a question."""
    for index, record in enumerate(sound(RecordFile(path))):
        value = record.value
        if isinstance(value, str):
            yield BenchPrompt(str(index), "file", text=value)
            continue
        facts = value if isinstance(value, dict) else {}
        is_conversation = any(key in facts for key in CONVERSATION_KEYS)
        try:
            for asked in find_queries(value, "first" if is_conversation else "last"):
                name, domain = str(facts.get("id", index)), str(facts.get("domain", "file"))
                yield BenchPrompt(name, domain, asked.messages, asked.text)
        except ValueError as error:
            # Collections of conversations hold some in which no user speaks.
            if not (is_conversation and isinstance(error, NoQueryError)):
                raise ValueError(f"{record.where} is no prompt: {error}") from error


def _read_named(name: str, folder: Path | None) -> list[BenchPrompt]:
    if name == "demo":
        rows = read_objects(demo_path("prompts.jsonl"))
        prompts = (BenchPrompt(row["id"], row["domain"], tuple(row["messages"])) for row in rows)
        return _in_turn(prompts)
    if name == HELD_OUT:  # the three domains of the demo models, none of it seen in training
        domains = (shuffled(_read_named(each, folder)) for each in ("gsm8k", "sgd", "taskmaster4"))
        return [prompt for group in zip(*domains, strict=False) for prompt in group]
    return [record.value for record in sound(open_named(name, _NAMED[name], folder))]


def _in_turn(prompts: Iterable[BenchPrompt]) -> list[BenchPrompt]:
    """The first of every domain, then the second of every domain, and so on."""
    seen: defaultdict[str, Iterator[int]] = defaultdict(count)
    return sorted(prompts, key=lambda prompt: next(seen[prompt.domain]))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _dialogue(domain: str, every: int, index: int, row: Row) -> BenchPrompt | None:
    """Take every nth dialogue, up to one of its user turns that a fixed seed chooses."""
    turns = [{"role": role, "content": text} for role, text in row["turns"]]
    ends = [i + 1 for i, turn in enumerate(turns[:-1]) if turn["role"] == "user"]
    if index % every or not ends:
        return None
    return BenchPrompt(row["id"], domain, tuple(turns[: random.Random(row["id"]).choice(ends)]))


def _question(source: str, _: int, row: Row) -> BenchPrompt:
    """Take a question of several turns, in the names of the original file or of the hub's copy."""
    first, *follow_ups = row["turns"] if "turns" in row else row["prompt"]
    number = row["question_id"] if "question_id" in row else row["prompt_id"]
    name, asked = f"{source}-{number}", (_user(first),)
    return BenchPrompt(name, row["category"], asked, follow_ups=tuple(follow_ups))


_TURNS = 'a line a dialogue: {"id", "turns": [[role, text], ...]}'
_NAMED = {
    "gsm8k": NamedSource(
        "gsm8k/test.jsonl",
        lambda i, row: BenchPrompt(f"gsm8k-{i}", "gsm8k", (_user(row["question"]),)),
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
    ),
    "sgd": NamedSource(
        "sgd/dev.jsonl",
        partial(_dialogue, "sgd", 1),
        published="whose copy is a loading script, which datasets does not run any more; the "
        f"original is dstc8-schema-guided-dialogue, {_TURNS}",
    ),
    "taskmaster4": NamedSource(
        "taskmaster4/dialogs.jsonl",
        # The other nine tenths are what the demo models were trained on.
        partial(_dialogue, "taskmaster4", 10),
        published=f"the original is google-research-datasets/Taskmaster, TM-4, {_TURNS}",
    ),
    "spec_bench": NamedSource(
        "spec_bench/question.jsonl",
        partial(_question, "spec_bench"),
        published="the original is data/spec_bench of hemingkx/Spec-Bench",
    ),
    "mt_bench": NamedSource(
        "mt_bench/question.jsonl",
        partial(_question, "mt_bench"),
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    ),
    "human_eval": NamedSource(
        "human_eval/HumanEval.jsonl.gz",
        lambda _, row: BenchPrompt(row["task_id"], "human_eval", text=row["prompt"]),
        {"path": "openai/openai_humaneval", "split": "test"},
    ),
}
SOURCES = ("demo", HELD_OUT, *_NAMED)
