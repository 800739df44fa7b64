"""What a record asks: requests to OpenAI-style endpoints, conversations, and plain questions."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specdec.common.messages import Message

TURNS = ("all", "last", "first")
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
_CONVERSATION_KEYS = ("conversations", "conversation")
_QUESTION_KEYS = ("prompt", "question", "query", "text")
_ANSWER_KEYS = ("answer", "response", "completion", "output")

_NOT_ITS_FAULT = {408, 425, 429, 499}  # too late, too early, too many, and a client that left


class NoQueryError(Exception):
    """A sound record that asks nothing which a text model could be asked again.

    Attributes:
        reason: "no_user_turn", "not_text", "tools", "other_request" or "refused".
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Asked:
    """Messages up to a user's turn, or the text of a completion, and what was answered."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None


def asked_in(record: Any, turns: str = "all") -> Iterator[Asked]:
    """The queries of one record.

    A request is one query, up to its last user turn. A conversation (ShareGPT, or messages that an
    answer ends) was a request at each of its user turns.

    Args:
        record: a request, `{"request": ..., "response": ...}`, a line of a batch, a conversation,
            an object with a question, or the question itself.
        turns: of a conversation, those that become queries, one of `TURNS`.

    Raises:
        NoQueryError: nothing to ask a text model.
        ValueError: a record of no known form.
    """
    if isinstance(record, str):
        yield _question(record)
    elif isinstance(record, list):
        yield from _turns(record, None, turns)
    elif isinstance(record, dict):
        body, response, is_request = _unwrapped(record)
        yield from _asked(body, response, is_request or "model" in body, turns)
    else:
        raise ValueError(f"a record must be an object or text, not {type(record).__name__}")


def _unwrapped(record: dict[str, Any]) -> tuple[dict[str, Any], Any, bool]:
    """The request's body, the response, and whether it is surely a request."""
    inner = record.get("request", record)
    inner = inner.get("body", inner) if isinstance(inner, dict) else inner
    if not isinstance(inner, dict):
        raise ValueError(f"its request is {type(inner).__name__} but must be an object")
    if inner is record and isinstance(record.get("response"), dict):
        raise ValueError("it holds a response without its request; give the file of the requests")
    if _is_refused(record.get("status")):
        raise NoQueryError("refused")
    whole = record.get("complete") is not False  # a recorded stream may have broken off
    return inner, record.get("response") if whole else None, inner is not record


def _is_refused(status: Any) -> bool:
    """Whether the server answers so to a request that is wrong in itself."""
    return isinstance(status, int) and 400 <= status < 500 and status not in _NOT_ITS_FAULT


def _asked(body: dict[str, Any], response: Any, is_request: bool, turns: str) -> Iterator[Asked]:
    conversation = next((body[key] for key in _CONVERSATION_KEYS if key in body), None)
    if "messages" in body:
        messages = _list(body["messages"], "messages")
        ends_open = not messages or _role(messages[-1]) != "assistant"
        only = "last" if is_request or ends_open else turns
        yield from _turns(messages, _answer(response), only)
    elif conversation is not None:
        yield from _turns(_list(conversation, "conversations"), None, turns)
    elif is_request:
        if "prompt" not in body:
            raise NoQueryError("other_request")
        yield from _completions(body["prompt"], _answer(response))
    else:
        yield _plain(body)


def _completions(prompt: Any, answer: str | None) -> Iterator[Asked]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts:
        raise ValueError("its prompt is an empty list")
    if any(isinstance(each, int | list) for each in prompts):
        raise NoQueryError("not_text")  # token ids
    for each in prompts:
        if not isinstance(each, str):
            raise ValueError(f"its prompt is {type(each).__name__} but must be text")
        yield Asked(text=each, answer=answer if len(prompts) == 1 else None)


def _plain(row: dict[str, Any]) -> Asked:
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


def _question(text: Any, answer: str | None = None) -> Asked:
    if not isinstance(text, str):
        raise ValueError(f"its question is {type(text).__name__} but must be text")
    return Asked(({"role": "user", "content": text},), answer=answer)


def _turns(turns: list[Any], answer: str | None, chosen: str) -> Iterator[Asked]:
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
        yield Asked(tuple(messages), answer=found)


def _reply(turns: list[Any]) -> str | None:
    if not turns or _role(turns[0]) != "assistant":
        return None
    try:
        return _content(turns[0])
    except NoQueryError:
        return None


def _role(turn: Any) -> str:
    given = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if isinstance(given, str) and given in _TOOL_ROLES:
        return "tool"
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
    """What the endpoint answered first; None where it is not in the record."""
    if isinstance(response, str):
        return response
    if not isinstance(response, dict):
        return None
    if isinstance(response.get("body"), dict):
        return _answer(response["body"])
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    found = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    return found if isinstance(found, str) else None


SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Query:
    """What was asked, without who asked it.

    Attributes:
        id: hash of the text; the same query has the same one wherever it was found.
        messages: the chat up to a user's turn; empty for a completion.
        text: the raw prompt of a completion; empty for a chat.
        answer: that was recorded with it, for reference; drafters are never trained on it.
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
        """What is asked last; of a completion, all of it."""
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
    """The queries of one split of a folder that `specdec collect` wrote.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is no such folder, or has no such split.
    """
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
