"""Prompts by source name, from a data folder, the hub, or a file."""

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.demo import demo_path

Message = dict[str, str]
DATA_DIR_VARIABLE = "SPECDEC_DATA_DIR"


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt: chat messages, or text that is continued as it is.

    Attributes:
        id: unique in its source.
        domain: what results are grouped by.
        messages: the conversation up to a user turn; empty for plain text.
        text: plain text; empty for a conversation.
        follow_ups: later user turns, each asked after the model's own answer.
    """

    id: str
    domain: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    follow_ups: tuple[str, ...] = ()


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number} is not JSON: {error}") from error


def _demo(_: Path | None) -> list[BenchPrompt]:
    rows = _lines(demo_path("prompts.jsonl"))
    return [BenchPrompt(r["id"], r["domain"], tuple(r["messages"])) for r in rows]


def _gsm8k(folder: Path | None) -> list[BenchPrompt]:
    rows = _rows(folder, "gsm8k/test.jsonl", "openai/gsm8k", name="main", split="test")
    return [BenchPrompt(f"gsm8k-{i}", "gsm8k", _user(r["question"])) for i, r in enumerate(rows)]


def _dialogues(domain: str, rows: list[dict[str, Any]]) -> list[BenchPrompt]:
    """Each dialogue up to one of its user turns, chosen by a fixed seed."""
    prompts = []
    for row in rows:
        turns = [{"role": role, "content": text} for role, text in row["turns"]]
        ends = [i + 1 for i, turn in enumerate(turns[:-1]) if turn["role"] == "user"]
        if ends:
            end = random.Random(row["id"]).choice(ends)
            prompts.append(BenchPrompt(row["id"], domain, tuple(turns[:end])))
    return prompts


def _sgd(folder: Path | None) -> list[BenchPrompt]:
    return _dialogues("sgd", list(_local_rows(folder, "sgd/dev.jsonl")))


def _taskmaster4(folder: Path | None) -> list[BenchPrompt]:
    rows = list(_local_rows(folder, "taskmaster4/dialogs.jsonl"))
    return _dialogues("taskmaster4", rows[::10])


def _questions(source: str, folder: Path | None) -> list[BenchPrompt]:
    return [
        BenchPrompt(
            f"{source}-{row['question_id']}",
            row["category"],
            _user(row["turns"][0]),
            follow_ups=tuple(row["turns"][1:]),
        )
        for row in _local_rows(folder, f"{source}/question.jsonl")
    ]


def _human_eval(folder: Path | None) -> list[BenchPrompt]:
    rows = _rows(folder, "human_eval/HumanEval.jsonl.gz", "openai/openai_humaneval", split="test")
    return [BenchPrompt(row["task_id"], "human_eval", text=row["prompt"]) for row in rows]


def _held_out(folder: Path | None) -> list[BenchPrompt]:
    """The three domains of the demo models in turn, none of it seen in training."""
    domains = [_shuffled(read(folder)) for read in (_gsm8k, _sgd, _taskmaster4)]
    return [prompt for group in zip(*domains, strict=False) for prompt in group]


SOURCES: dict[str, Callable[[Path | None], list[BenchPrompt]]] = {
    "demo": _demo,
    "gsm8k": _gsm8k,
    "sgd": _sgd,
    "taskmaster4": _taskmaster4,
    "held_out": _held_out,
    "spec_bench": lambda folder: _questions("spec_bench", folder),
    "mt_bench": lambda folder: _questions("mt_bench", folder),
    "human_eval": _human_eval,
}


def load_prompts(
    source: str, num: int, data_dir: str | None = None, seed: int = 0
) -> list[BenchPrompt]:
    """Take `num` prompts of a source; the same ones for the same seed.

    Args:
        source: a name in `SOURCES`, or a JSONL, ShareGPT JSON or text file (a prompt a line).
        num: prompts to take, at most; seed 0 keeps the order of "demo", "held_out" and of files.
        data_dir: folder of the named sources; default: the variable SPECDEC_DATA_DIR, then the
            hub where the source is there.

    Raises:
        ValueError: an unknown source, or a file with nothing in it.
        FileNotFoundError: the source's data is nowhere.
    """
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if source in SOURCES:
        prompts = SOURCES[source](Path(folder) if folder else None)
    elif Path(source).is_file():
        prompts = _file(Path(source))
    else:
        raise ValueError(
            f"prompts.source is {source!r} but must be a file or one of {', '.join(SOURCES)}"
        )
    if not prompts:
        raise ValueError(f"prompts.source {source!r} holds no prompts")
    if seed or source in ("gsm8k", "sgd", "taskmaster4"):
        prompts = _shuffled(prompts, seed)
    elif source == "demo":
        prompts = _by_turns(prompts)
    return prompts[:num]


def _shuffled(prompts: list[BenchPrompt], seed: int = 0) -> list[BenchPrompt]:
    return random.Random(seed).sample(prompts, len(prompts))


def _by_turns(prompts: list[BenchPrompt]) -> list[BenchPrompt]:
    """Domains in turn, so that any number of first prompts is balanced."""
    position: dict[str, int] = {}
    keyed = []
    for prompt in prompts:
        position[prompt.domain] = position.get(prompt.domain, -1) + 1
        keyed.append((position[prompt.domain], prompt))
    return [prompt for _, prompt in sorted(keyed, key=lambda pair: pair[0])]


def _local_rows(folder: Path | None, name: str) -> Iterator[dict[str, Any]]:
    if folder is None or not (folder / name).is_file():
        raise FileNotFoundError(
            f"{name} is not in {str(folder) if folder else 'any data folder'}; set "
            f"{DATA_DIR_VARIABLE} or prompts.data_dir to a folder that holds it"
        )
    return _lines(folder / name)


def _rows(folder: Path | None, file: str, hub_id: str, **hub: str) -> list[dict[str, Any]]:
    if folder is not None and (folder / file).is_file():
        return list(_lines(folder / file))
    try:
        from datasets import load_dataset

        return list(load_dataset(hub_id, **hub))
    except Exception as error:
        raise FileNotFoundError(
            f"{file} is not in {folder or 'any data folder'} and {hub_id} could not be read from "
            f"the hub ({type(error).__name__}); set {DATA_DIR_VARIABLE} or prompts.data_dir"
        ) from error


def _file(path: Path) -> list[BenchPrompt]:
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [BenchPrompt(str(i), "file", text=t) for i, t in enumerate(lines) if t.strip()]
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = list(_lines(path))
    return [_record(path, i, row) for i, row in enumerate(rows)]


_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "system": "system"}


def _record(path: Path, index: int, row: dict[str, Any]) -> BenchPrompt:
    name, domain = str(row.get("id", index)), str(row.get("domain", "file"))
    if "messages" in row:
        return BenchPrompt(name, domain, tuple(row["messages"]))
    if "conversations" in row:
        turns = [
            {"role": _SHAREGPT_ROLES.get(t["from"], t["from"]), "content": t["value"]}
            for t in row["conversations"]
        ]
        end = next((i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
        return BenchPrompt(name, domain, tuple(turns[:end]))
    for key in ("prompt", "text", "question", "instruction"):
        if isinstance(row.get(key), str):
            return BenchPrompt(name, domain, _user(row[key]))
    raise ValueError(
        f"{path} record {index} has the keys {sorted(row)} but needs messages, conversations, "
        "prompt, text, question or instruction"
    )


def render(prompt: BenchPrompt, tokenizer: Any) -> list[Message] | str:
    """What `generate` takes: messages where the tokenizer has a chat template, else text."""
    if not prompt.messages:
        return prompt.text
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        return list(prompt.messages)
    return "\n".join(message["content"] for message in prompt.messages)
