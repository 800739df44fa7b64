"""The prompts of a bench: a named source or a file, in an order that its seed decides."""

import gzip
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.common.files import parse_json
from specdec.common.hub import HUB, find_path
from specdec.common.messages import BenchPrompt, Message, shuffled
from specdec.demo import demo_path
from specdec.engine.interfaces import Target
from specdec.engine.text import encode

DATA_DIR_VARIABLE = "SPECDEC_DATA_DIR"
HELD_OUT = "held_out"
_TEXT_KEYS = ("prompt", "text", "question", "instruction")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "system": "system"}
Rows = list[dict[str, Any]]


def load_prompts(
    source: str, num: int, data_dir: str | None = None, seed: int = 0
) -> list[BenchPrompt]:
    """Take `num` prompts of a source; the same ones for the same seed.

    Args:
        source: a name in `SOURCES`; a JSONL, ShareGPT JSON or text file (a prompt a line); or a
            folder that `specdec collect` wrote, whose held-out queries are taken.
        num: prompts to take, at most; seed 0 keeps the order of "demo", "held_out", files and
            folders.
        data_dir: folder of the named sources; default: the variable SPECDEC_DATA_DIR, then the
            hub where the source is there.
        seed: decides the order.

    Raises:
        ValueError: an unknown source, a record that cannot be read, or nothing to decode.
        FileNotFoundError: the source's data is nowhere.
    """
    if source in SOURCES:
        folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        prompts = read_source(source, Path(folder).expanduser() if folder else None)
    elif Path(source).is_file():
        prompts = read_file(Path(source))
    elif Path(source).is_dir():
        prompts = read_collected(Path(source))
    else:
        raise ValueError(
            f"prompts.source is {source!r} but must be a file, a folder that specdec collect "
            f"wrote, or one of {', '.join(SOURCES)}"
        )
    if not prompts:
        raise ValueError(f"prompts.source {source!r} holds no prompts; give a file with at least 1")
    if empty := [prompt for prompt in prompts if prompt.is_empty]:
        raise ValueError(
            f"prompts.source {source!r}: prompt {empty[0].id!r} is empty but needs some text to "
            "continue from; fill it in or remove it"
        )
    if seed or (source in SOURCES and source not in _ORDERED):
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


# --- Folders and files ---


def read_collected(folder: Path) -> list[BenchPrompt]:
    """Read what no drafter was trained on; the order is the folder's, which hashes decided."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ValueError(
            f"prompts.source {str(folder)!r} is a folder, and folders need datasets; install it "
            "with: pip install 'specdec[collect]'"
        ) from error
    prompts = []
    try:
        rows: Any = load_from_disk(str(folder))[HELD_OUT]
        for row in rows:
            turns = tuple({k: turn[k] for k in ("role", "content")} for turn in row["messages"])
            domain, text = row["domain"] or "collected", "" if turns else row["text"]
            prompts.append(BenchPrompt(row["id"], domain, turns, text))
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(
            f"prompts.source {str(folder)!r} holds no split {HELD_OUT!r} of collected queries "
            f"({error}); give a folder that specdec collect wrote, or a file"
        ) from error
    return prompts


def read_file(path: Path) -> list[BenchPrompt]:
    """Read prompts by the file's suffix.

    `.txt`: each line that is not blank is continued as it is. `.json`: a list of records.
    Anything else (`.jsonl`, `.jsonl.gz`): a JSON record a line. A record holds `messages` (used up
    to the last user turn), ShareGPT `conversations` (used up to the first user turn; one without
    any is skipped), or `prompt`, `text`, `question` or `instruction`.

    Raises:
        ValueError: the file or a record is not of that form; it is named.
    """
    if path.suffix == ".txt":
        lines = _decoded(path).split("\n")
        return [BenchPrompt(str(i), "file", text=t) for i, t in enumerate(lines) if t.strip()]
    prompts = []
    for index, row in enumerate(_records(path) if path.suffix == ".json" else read_lines(path)):
        try:
            prompts += _prompts_of(index, row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} record {index} is no prompt: {reason}") from error
    return prompts


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, gzipped or not; `ValueError` names a line that is none."""
    # Not splitlines: JSON strings may hold other characters that it takes for ends of lines.
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(
                    f"{path} line {number} is not JSON ({error}); text files must end in .txt"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is {line[:40]!r} but must be an object")
            yield row


def _decoded(path: Path) -> str:
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            text = str(file.read())
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not UTF-8 text, or damaged: {error}") from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL characters; it is not UTF-8 text")
    return text


def _records(path: Path) -> list[Any]:
    try:
        rows = parse_json(_decoded(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds one {type(rows).__name__} but must hold a list of records")
    return rows


def _prompts_of(index: int, row: dict[str, Any]) -> list[BenchPrompt]:
    """The prompt of a record; none for a ShareGPT conversation without a user's turn."""
    name, domain = str(row.get("id", index)), str(row.get("domain", "file"))
    if "messages" in row:
        turns = [_message(turn["role"], turn["content"]) for turn in row["messages"]]
        ends = _ends_of_user_turns(turns)
        if not ends:
            raise ValueError("its messages hold no user turn")
        return [BenchPrompt(name, domain, tuple(turns[: ends[-1]]))]
    if "conversations" in row:
        pairs = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        turns = [_message(_SHAREGPT_ROLES.get(role, role), text) for role, text in pairs]
        return [
            BenchPrompt(name, domain, tuple(turns[:end])) for end in _ends_of_user_turns(turns)[:1]
        ]
    for key in _TEXT_KEYS:
        if key in row:
            return [BenchPrompt(name, domain, (_message("user", row[key]),))]
    raise ValueError(
        f"it has the keys {sorted(row)} but needs messages, conversations, {', '.join(_TEXT_KEYS)}"
    )


def _ends_of_user_turns(turns: Sequence[Message]) -> list[int]:
    return [i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"]


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a turn has role {role!r} and content {content!r} but both must be text")
    return {"role": role, "content": content}


# --- Named sources ---


@dataclass(frozen=True)
class Source:
    """A source and where to find it.

    Attributes:
        file: its path in the data folder.
        parse: from records to prompts.
        hub: arguments of `datasets.load_dataset`; None where the hub has no loadable copy.
        published: where it comes from, if not from the hub.
    """

    file: str
    parse: Callable[[Rows], list[BenchPrompt]]
    hub: Mapping[str, str] | None = None
    published: str = ""


def _gsm8k(rows: Rows) -> list[BenchPrompt]:
    return [
        BenchPrompt(f"gsm8k-{i}", "gsm8k", (_message("user", row["question"]),))
        for i, row in enumerate(rows)
    ]


def _dialogues(domain: str, rows: Rows) -> list[BenchPrompt]:
    """Each dialogue up to one of its user turns, chosen by a fixed seed."""
    prompts = []
    for row in rows:
        turns = [{"role": role, "content": text} for role, text in row["turns"]]
        if ends := _ends_of_user_turns(turns[:-1]):
            end = random.Random(row["id"]).choice(ends)
            prompts.append(BenchPrompt(row["id"], domain, tuple(turns[:end])))
    return prompts


def _questions(source: str, rows: Rows) -> list[BenchPrompt]:
    """Questions of several turns, in the names of the original file or of the hub's copy."""
    prompts = []
    for row in rows:
        turns = row["turns"] if "turns" in row else row["prompt"]
        number = row["question_id"] if "question_id" in row else row["prompt_id"]
        first, later = (_message("user", turns[0]),), tuple(turns[1:])
        prompts.append(BenchPrompt(f"{source}-{number}", row["category"], first, follow_ups=later))
    return prompts


def _human_eval(rows: Rows) -> list[BenchPrompt]:
    return [BenchPrompt(row["task_id"], "human_eval", text=row["prompt"]) for row in rows]


_FILED: dict[str, Source] = {
    "gsm8k": Source(
        "gsm8k/test.jsonl", _gsm8k, {"path": "openai/gsm8k", "name": "main", "split": "test"}
    ),
    "sgd": Source(
        "sgd/dev.jsonl",
        lambda rows: _dialogues("sgd", rows),
        published="its hub copy is a loading script, which datasets does not run any more; the "
        'original is dstc8-schema-guided-dialogue, a line a dialogue: {"id", "turns": [[role, '
        "text], ...]}",
    ),
    "taskmaster4": Source(
        "taskmaster4/dialogs.jsonl",
        # The other nine tenths are what the demo models were trained on.
        lambda rows: _dialogues("taskmaster4", rows[::10]),
        published="it is not on the hub; the original is google-research-datasets/Taskmaster, "
        'TM-4, a line a dialogue: {"id", "turns": [[role, text], ...]}',
    ),
    "spec_bench": Source(
        "spec_bench/question.jsonl",
        lambda rows: _questions("spec_bench", rows),
        published="it is not on the hub; the original is data/spec_bench of hemingkx/Spec-Bench",
    ),
    "mt_bench": Source(
        "mt_bench/question.jsonl",
        lambda rows: _questions("mt_bench", rows),
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    ),
    "human_eval": Source(
        "human_eval/HumanEval.jsonl.gz",
        _human_eval,
        {"path": "openai/openai_humaneval", "split": "test"},
    ),
}
SOURCES = ("demo", "held_out", *_FILED)
# Balanced as they stand; the others are shuffled.
_ORDERED = frozenset({"demo", "held_out", "spec_bench", "mt_bench", "human_eval"})


def read_source(name: str, folder: Path | None) -> list[BenchPrompt]:
    """All prompts of a named source.

    Args:
        name: one of `SOURCES`.
        folder: the data folder; where the source's file is not in it, the hub is asked.

    Raises:
        FileNotFoundError: neither has it.
        ValueError: its records are not what they should be.
    """
    if name == "demo":
        return _in_turn(_demo_prompts())
    if name == "held_out":  # the three domains of the demo models, none of it seen in training
        domains = (shuffled(read_source(each, folder)) for each in ("gsm8k", "sgd", "taskmaster4"))
        return [prompt for group in zip(*domains, strict=False) for prompt in group]
    source = _FILED[name]
    rows = _rows(name, source, folder)
    try:
        return source.parse(rows)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{source.file} of prompts.source {name!r} does not have the original's records "
            f"({type(error).__name__}: {error}); restore the file"
        ) from error


def _demo_prompts() -> list[BenchPrompt]:
    return [
        BenchPrompt(row["id"], row["domain"], tuple(row["messages"]))
        for row in read_lines(demo_path("prompts.jsonl"))
    ]


def _in_turn(prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """Domains in turn, so that any number of first prompts is balanced."""
    seen: dict[str, int] = {}
    keyed = []
    for prompt in prompts:
        seen[prompt.domain] = seen.get(prompt.domain, -1) + 1
        keyed.append((seen[prompt.domain], prompt))
    return [prompt for _, prompt in sorted(keyed, key=lambda pair: pair[0])]


def _rows(name: str, source: Source, folder: Path | None) -> Rows:
    if folder is not None and (folder / source.file).is_file():
        return list(read_lines(folder / source.file))
    require_data_dir(folder)
    missing = f"prompts.source {name!r}: {source.file} is not in {folder or 'any data folder'}"
    fix = f"set {DATA_DIR_VARIABLE} or prompts.data_dir to a folder that holds it"
    if source.hub is None:
        raise FileNotFoundError(f"{missing}, and {source.published}; {fix}")
    find_path(HUB + source.hub["path"], "")  # says so
    try:
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(**source.hub)]
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}, and reading it from the hub needs the package datasets; {fix}, or: "
            "pip install 'specdec[train]'"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"{missing}, and {source.hub['path']} could not be read from the hub "
            f"({type(error).__name__}); {fix}"
        ) from error


def require_data_dir(folder: Path | None) -> None:
    """Refuse a data folder that is not there, rather than ask the hub in its place."""
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {str(folder)!r} is not a folder; mend {DATA_DIR_VARIABLE}, or the "
            "option that names it, or give neither to ask the hub"
        )
