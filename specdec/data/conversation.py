"""Find the queries in records of logs; read and write folders and files of queries."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from specdec.bench.prompts import read_lines
from specdec.common.config import Config, validated
from specdec.common.messages import Message

_ROLE_NAMES = {
    "user": "user human",
    "assistant": "assistant gpt chatgpt bard bing model",
    "system": "system developer",
    "tool": "tool function function_call observation ipython",
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names.split()}
_CONVERSATION_KEYS = ("conversations", "conversation")
_QUESTION_KEYS = ("prompt", "question", "query", "text")
_ANSWER_KEYS = ("answer", "response", "completion", "output")

_NOT_ITS_FAULT = {408, 425, 429, 499}  # too late, too early, too many, and a client that left


class NoQueryError(Exception):
    """A sound record that asks nothing which a text model could be asked again."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class RawQuery:
    """Messages up to a user's turn, or the text of a completion, and what was answered."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None


def find_queries(record: Any, turns: str = "all") -> Iterator[RawQuery]:
    """Find the queries of one record.

    A request is one query, up to its last user turn. A conversation (ShareGPT, or messages that an
    answer ends) was a request at each of its user turns.
    """
    if isinstance(record, str):
        yield _question(record)
    elif isinstance(record, list):
        yield from _at_user_turns(record, None, turns)
    elif isinstance(record, dict):
        yield from _queries_in_object(record, turns)
    else:
        raise ValueError(f"a record must be an object or text, not {type(record).__name__}")


def _queries_in_object(record: dict[str, Any], turns: str) -> Iterator[RawQuery]:
    body, response, is_wrapped = _unwrapped(record)
    is_request = is_wrapped or "model" in body
    answer = _answer(response)
    conversation = next((body[key] for key in _CONVERSATION_KEYS if key in body), None)
    if "messages" in body:
        messages = _list(body["messages"], "messages")
        ends_open = not messages or _role(messages[-1]) != "assistant"
        yield from _at_user_turns(messages, answer, "last" if is_request or ends_open else turns)
    elif conversation is not None:
        yield from _at_user_turns(_list(conversation, "conversations"), None, turns)
    elif not is_request:
        yield _plain(body)
    elif "prompt" in body:
        yield from _completions(body["prompt"], answer)
    else:
        raise NoQueryError("other_request")


def _unwrapped(record: dict[str, Any]) -> tuple[dict[str, Any], Any, bool]:
    """The request's body, the response, and whether it is surely a request."""
    inner = record.get("request", record)
    inner = inner.get("body", inner) if isinstance(inner, dict) else inner
    if not isinstance(inner, dict):
        raise ValueError(f"its request is {type(inner).__name__} but must be an object")
    if inner is record and isinstance(record.get("response"), dict):
        raise ValueError("it holds a response without its request; give the file of the requests")
    status = record.get("status")
    if isinstance(status, int) and 400 <= status < 500 and status not in _NOT_ITS_FAULT:
        raise NoQueryError("refused")
    is_whole = record.get("complete") is not False  # a recorded stream may have broken off
    return inner, record.get("response") if is_whole else None, inner is not record


def _completions(prompt: Any, answer: str | None) -> Iterator[RawQuery]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts:
        raise ValueError("its prompt is an empty list")
    if any(isinstance(each, int | list) for each in prompts):
        raise NoQueryError("not_text")  # token ids
    for each in prompts:
        if not isinstance(each, str):
            raise ValueError(f"its prompt is {type(each).__name__} but must be text")
        yield RawQuery(text=each, answer=answer if len(prompts) == 1 else None)


def _plain(row: dict[str, Any]) -> RawQuery:
    answer = next((row[key] for key in _ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if "instruction" in row:
        parts = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("its instruction and input must be text")
        return _question("\n\n".join(part for part in parts if part), answer)
    for key in _QUESTION_KEYS:
        if key in row:
            return _question(row[key], answer)
    if len(row) == 1:
        return _question(next(iter(row.values())))
    raise ValueError(
        f"its keys are {sorted(map(str, row))[:12]} but one must be messages, conversations, "
        f"instruction, {', '.join(_QUESTION_KEYS)}, or be named as column"
    )


def _question(text: Any, answer: str | None = None) -> RawQuery:
    if not isinstance(text, str):
        raise ValueError(f"its question is {type(text).__name__} but must be text")
    return RawQuery(({"role": "user", "content": text},), answer=answer)


def _at_user_turns(turns: list[Any], answer: str | None, chosen: str) -> Iterator[RawQuery]:
    """One query for each user turn that is chosen, with the turn behind it as its answer."""
    roles = [_role(turn) for turn in turns]
    # A piece cut from a longer conversation may begin with an answer to nothing.
    start = next((i for i, role in enumerate(roles) if role != "assistant"), len(roles))
    ends = [i + 1 for i, role in enumerate(roles) if role == "user"]
    if not ends:
        raise NoQueryError("no_user_turn")
    messages: list[Message] = []  # that the queries share, for the sake of memory
    for end in {"all": ends, "last": ends[-1:], "first": ends[:1]}[chosen]:
        messages += [_message(turn) for turn in turns[start + len(messages) : end]]
        found = answer if answer is not None else _reply(turns[end:])
        yield RawQuery(tuple(messages), answer=found)


def _reply(turns: list[Any]) -> str | None:
    if not turns or _role(turns[0]) != "assistant":
        return None
    try:
        return _content(turns[0])
    except NoQueryError:
        return None


def _role(turn: Any) -> str:
    given = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(given, str) or given not in _ROLES:
        raise ValueError(f"a turn has the role {given!r} but must be of {sorted(_ROLES)}")
    return _ROLES[given]


def _message(turn: dict[str, Any]) -> Message:
    role = _role(turn)
    if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
        raise NoQueryError("tools")
    return {"role": role, "content": _content(turn)}


def _content(turn: dict[str, Any]) -> str:
    """Text of a turn; parts of text are joined by line breaks, as chat templates join them."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return content
    if content is None and (turn.get("tool_calls") or turn.get("function_call")):
        raise NoQueryError("tools")
    texts = []
    for part in _list(content, "content"):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise NoQueryError("not_text")
        texts.append(text)
    return "\n".join(texts)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {name} is {type(value).__name__} but must be a list")
    return value


def _answer(response: Any) -> str | None:
    """The first answer of the endpoint; None where it is not in the record."""
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = response["body"]
    if isinstance(response, dict):
        choices = response.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        message = first.get("message") if isinstance(first, dict) else None
        if isinstance(message, dict):
            response = message.get("content")
        else:
            response = first.get("text") if isinstance(first, dict) else None
    return response if isinstance(response, str) else None


SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Query:
    """One thing that a user asked, without the user.

    Attributes:
        id: hash of the text; the same query has the same one wherever it was found.
        messages: the chat up to a user's turn; empty for a completion.
        text: the raw prompt of a completion; empty for a chat.
        answer: recorded answer, for reference; drafters are never trained on it.
        domain: a tag that splits and results are told apart by; may be empty.
        language: ISO 639 code; may be empty.
        source: the file and line, or the data set and row, that it came from.
        conversation: hash of its first user turn; queries that share it are in the same split.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None
    domain: str = ""
    language: str = ""
    source: str = ""
    conversation: str = ""

    @property
    def last_turn(self) -> str:
        """The turn that is asked last; all of a completion."""
        return self.messages[-1]["content"] if self.messages else self.text


def write_queries(queries: dict[str, list[Query]], folder: Path) -> None:
    """Write a `datasets` folder with one split for each key."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    names = [field.name for field in fields(Query)]
    types = {name: List(message) if name == "messages" else Value("string") for name in names}
    splits = {
        split: Dataset.from_dict(
            {name: [getattr(query, name) for query in found] for name in names}, Features(types)
        )
        for split, found in queries.items()
    }
    # What is empty gets no file unless told to, and could then not be loaded (datasets 5.2).
    shards = {split: None if found else 1 for split, found in queries.items()}
    DatasetDict(splits).save_to_disk(folder, num_shards=shards)


def read_queries(folder: Path, split: str) -> list[Query]:
    """Read one split of a folder that `specdec collect` wrote."""
    from datasets import load_from_disk

    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder; give one that collect wrote")
    try:
        found: Any = load_from_disk(str(folder))
        rows = found[split]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no split {split!r} of collected queries ({error}); give a "
            "folder that collect wrote"
        ) from error
    return [Query(**{**row, "messages": tuple(row["messages"])}) for row in rows]


class _Turn(Config):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class _Row(Config):
    model_config = ConfigDict(extra="ignore")

    id: Any = None
    messages: list[_Turn] | None = None
    text: str | None = None
    split: Literal["train", "held_out"] = "train"
    domain: Any = None
    language: Any = None

    def query(self, given: dict[str, Any]) -> Query:
        if (self.messages is None) == (self.text is None):
            raise ValueError('it needs either "messages" or "text"')
        whole = json.dumps([given.get("messages"), given.get("text")], sort_keys=True)
        return Query(
            id=str(self.id or hashlib.sha256(whole.encode()).hexdigest()[:16]),
            messages=tuple(turn.model_dump() for turn in self.messages or ()),
            text=self.text or "",
            domain=str(self.domain or ""),
            language=str(self.language or ""),
        )


def read_query_splits(path: Path) -> dict[str, list[Query]]:
    """Read the queries of every split.

    A line of a JSONL file holds `messages` (`{"role", "content"}` each) or `text`, and may hold
    `id`, `domain`, `language` and `split` ("train" or "held_out"; train if it is missing).

    Args:
        path: a folder as `write_queries` makes it, or a file.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no such folder or file, holds no query, or one id twice.
    """
    if path.is_dir():
        if find_spec("datasets") is None:
            raise ValueError(
                "a folder of collected queries needs datasets; install it with: "
                "pip install 'specdec[collect]'"
            )
        splits = {split: read_queries(path, split) for split in SPLITS}
    elif path.is_file():
        splits = {split: [] for split in SPLITS}
        for number, row in enumerate(read_lines(path), 1):
            try:
                given = validated(_Row, row, "its")
                splits[given.split].append(given.query(row))
            except ValueError as error:
                raise ValueError(f"{path}, query {number}: {error}") from error
    else:
        raise FileNotFoundError(
            f"{str(path)!r} does not exist; give a folder that collect wrote, or a JSONL file"
        )
    _check_ids([query.id for queries in splits.values() for query in queries], path)
    return splits


def _check_ids(ids: list[str], path: Path) -> None:
    if not ids:
        raise ValueError(f"{str(path)!r} holds no queries; give at least one")
    if len(set(ids)) < len(ids):
        twice = next(name for place, name in enumerate(ids) if name in ids[:place])
        raise ValueError(
            f"{str(path)!r} holds the query {twice!r} twice; remove one: answers are kept "
            "by id, and a query in two splits would be trained on and held out"
        )
