"""Queries of users: chat messages or text, found in records of many forms."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.common.distribution import install

Message = dict[str, str]

_ROLE_NAMES = {
    "user": "user human",
    "assistant": "assistant gpt chatgpt bard bing model",
    "system": "system developer",
    "tool": "tool function function_call observation ipython",
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names.split()}
CONVERSATION_KEYS = ("conversations", "conversation")
_QUESTION_KEYS = ("prompt", "question", "query", "text")
_ANSWER_KEYS = ("answer", "response", "completion", "output")
_NOT_ITS_FAULT = {408, 425, 429, 499}  # too late, too early, too many, and a client that left


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt: chat messages, or text that is continued as it is."""

    id: str  # unique in its source
    domain: str  # group of its results
    messages: tuple[Message, ...] = ()  # the conversation up to a user turn; empty for plain text
    text: str = ""
    follow_ups: tuple[str, ...] = ()  # later user turns, each asked after the model's own answer

    @property
    def is_empty(self) -> bool:
        last = self.messages[-1]["content"] if self.messages else self.text
        return not last.strip()


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shuffled(prompts: list[BenchPrompt], seed: int = 0) -> list[BenchPrompt]:
    return random.Random(seed).sample(prompts, len(prompts))


@dataclass(frozen=True)
class Query:
    """One thing that a user asked, without the user."""

    id: str  # hash of the text; the same query has the same one wherever it was found
    messages: tuple[Message, ...] = ()  # the chat up to a user's turn; empty for a completion
    text: str = ""  # the raw prompt of a completion
    answer: str | None = None  # as recorded; drafters are never trained on it
    domain: str = ""  # a tag that splits and results are told apart by
    language: str = ""  # ISO 639 code
    source: str = ""  # the file and line, or the data set and row, that it came from
    conversation: str = ""  # hash of its first user turn; queries that share it share a split

    @property
    def last_turn(self) -> str:
        return self.messages[-1]["content"] if self.messages else self.text


def read_queries(folder: Path, split: str) -> list[Query]:
    """Read one split of a folder that `specdec collect` wrote."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        fix = f"install datasets with: {install('collect')}"
        raise ValueError(f"to read the queries of {str(folder)!r} {fix}") from error
    try:
        found: Any = load_from_disk(str(folder))
        rows = found[split]
    except (FileNotFoundError, KeyError, ValueError) as error:
        what = f"no split {split!r} of collected queries ({error})"
        raise ValueError(f"{str(folder)!r} holds {what}; give one that collect wrote") from error
    return [Query(**{**row, "messages": tuple(row["messages"])}) for row in rows]


class NoQueryError(ValueError):
    """A sound record that asks nothing which a text model could be asked again."""

    def __init__(self, reason: str):
        super().__init__(f"it asks nothing of a text model ({reason})")
        self.reason = reason


def find_queries(record: Any, turns: str = "all") -> Iterator[Query]:
    """Find the queries of one record; they have no id yet.

    A request is one query, up to its last user turn. A conversation (ShareGPT, or messages that an
    answer ends) was a request at each of its user turns.
    """
    if isinstance(record, str):
        record = {"text": record.strip()}
    elif isinstance(record, list):
        record = {"conversation": record}
    elif not isinstance(record, dict):
        raise ValueError(f"a record must be an object or text, not {type(record).__name__}")
    body = record.get("request", record)
    body = body.get("body", body) if isinstance(body, dict) else body
    if not isinstance(body, dict):
        raise ValueError(f"its request is {type(body).__name__} but must be an object")
    is_wrapped = body is not record
    if not is_wrapped and isinstance(record.get("response"), dict):
        raise ValueError("it holds a response without its request; give the file of the requests")
    status = record.get("status")
    if isinstance(status, int) and 400 <= status < 500 and status not in _NOT_ITS_FAULT:
        raise NoQueryError("refused")
    # A recorded stream may have broken off.
    answer = None if record.get("complete") is False else _answer(record.get("response"))
    is_request = is_wrapped or "model" in body
    if "messages" in body:
        messages = _list(body["messages"], "messages")
        ends_open = not messages or _role(messages[-1]) != "assistant"
        yield from _at_user_turns(messages, answer, "last" if is_request or ends_open else turns)
    elif talk := [body[key] for key in CONVERSATION_KEYS if body.get(key) is not None]:
        yield from _at_user_turns(_list(talk[0], "conversations"), None, turns)
    elif not is_request:
        yield _plain(body)
    elif "prompt" in body:
        yield from _completions(body["prompt"], answer)
    else:
        raise NoQueryError("other_request")


def _answer(response: Any) -> str | None:
    try:
        body = response.get("body") if isinstance(response.get("body"), dict) else response
        choice = body["choices"][0]
        text = choice["message"].get("content") if choice.get("message") else choice.get("text")
    except (AttributeError, LookupError, TypeError):
        text = response
    return text if isinstance(text, str) else None


def _completions(prompt: Any, answer: str | None) -> Iterator[Query]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if any(isinstance(each, int | list) for each in prompts):
        raise NoQueryError("not_text")  # token ids
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise ValueError(f"its prompt is {prompt!r:.60} but must be text, or a list of texts")
    for each in prompts:
        yield Query("", text=each, answer=answer if len(prompts) == 1 else None)


def _plain(row: dict[str, Any]) -> Query:
    answer = next((row[key] for key in _ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if "instruction" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("its instruction and input must be text")
        return _question("\n\n".join(parts), answer)
    for key in _QUESTION_KEYS:
        if key in row:
            return _question(row[key], answer)
    if len(row) == 1:
        return _question(*row.values())
    raise ValueError(
        f"its keys are {sorted(map(str, row))[:12]} but one must be messages, conversations, "
        f"instruction, {', '.join(_QUESTION_KEYS)}, or be named as column"
    )


def _question(text: Any, answer: str | None = None) -> Query:
    if not isinstance(text, str):
        raise ValueError(f"its question is {type(text).__name__} but must be text")
    return Query("", ({"role": "user", "content": text},), answer=answer)


def _at_user_turns(turns: list[Any], answer: str | None, chosen: str) -> Iterator[Query]:
    roles = [_role(turn) for turn in turns]
    # A piece cut from a longer conversation may begin with an answer to nothing.
    start = next((i for i, role in enumerate(roles) if role != "assistant"), len(roles))
    ends = [i + 1 for i, role in enumerate(roles) if role == "user"]
    if not ends:
        raise NoQueryError("no_user_turn")
    messages: list[Message] = []  # that the queries share, for the sake of memory
    for end in {"all": ends, "last": ends[-1:], "first": ends[:1]}[chosen]:
        messages += [_message(turn) for turn in turns[start + len(messages) : end]]
        found = answer
        if answer is None and roles[end : end + 1] == ["assistant"]:
            with suppress(NoQueryError):  # a tool call, or an image
                found = _message(turns[end])["content"]
        yield Query("", tuple(messages), answer=found)


def _role(turn: Any) -> str:
    given = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(given, str) or given not in _ROLES:
        raise ValueError(f"a turn has the role {given!r} but must be of {sorted(_ROLES)}")
    return _ROLES[given]


def _message(turn: dict[str, Any]) -> Message:
    """Read a turn; parts of text are joined by line breaks, as chat templates join them."""
    role, content = _role(turn), turn.get("content", turn.get("value"))
    if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
        raise NoQueryError("tools")
    if not isinstance(content, str):
        parts = _list(content, "content")
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise NoQueryError("not_text")
        content = "\n".join(map(str, texts))
    return {"role": role, "content": content}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {name} is {type(value).__name__} but must be a list")
    return value
