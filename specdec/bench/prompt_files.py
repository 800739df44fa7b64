"""Prompts in files: JSONL records, ShareGPT conversations, or text."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.bench.prompt import BenchPrompt, Message
from specdec.files import parse_json

_TEXT_KEYS = ("prompt", "text", "question", "instruction")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "system": "system"}


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
    rows = _json(path) if path.suffix == ".json" else list(read_lines(path))
    prompts = []
    for index, row in enumerate(rows):
        try:
            prompt = _prompt(index, row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} record {index} is no prompt: {_reason(error)}") from error
        if prompt is not None:
            prompts.append(prompt)
    return prompts


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, gzipped or not.

    Raises:
        ValueError: a line is not a JSON object.
    """
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


def _json(path: Path) -> list[Any]:
    text = _decoded(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds one {type(rows).__name__} but must hold a list of records")
    return rows


def _prompt(index: int, row: dict[str, Any]) -> BenchPrompt | None:
    name, domain = str(row.get("id", index)), str(row.get("domain", "file"))
    if "messages" in row:
        turns = [_message(turn["role"], turn["content"]) for turn in row["messages"]]
        ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"]
        if not ends:
            raise ValueError("its messages hold no user turn")
        return BenchPrompt(name, domain, tuple(turns[: ends[-1]]))
    if "conversations" in row:
        turns = [_message(_role(turn["from"]), turn["value"]) for turn in row["conversations"]]
        ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"]
        return BenchPrompt(name, domain, tuple(turns[: ends[0]])) if ends else None
    for key in _TEXT_KEYS:
        if key in row:
            return BenchPrompt(name, domain, (_message("user", row[key]),))
    raise ValueError(
        f"it has the keys {sorted(row)} but needs messages, conversations, {', '.join(_TEXT_KEYS)}"
    )


def _role(name: str) -> str:
    return _SHAREGPT_ROLES.get(name, name)


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a turn has role {role!r} and content {content!r} but both must be text")
    return {"role": role, "content": content}


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
