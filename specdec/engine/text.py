"""Prompts in, text out: what callers pass becomes token ids, and new tokens become text."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from specdec.common.arguments import plain
from specdec.engine.interfaces import Target

# Numbers may stand in any array, and a mapping is what a tokenizer returns, or a message.
Prompt = str | Sequence[int] | Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def split_prompts(given: Any) -> list[Any]:
    """Return prompts as a list, also a single text, chat or row of ids; `encode` checks each."""
    rows = _unwrap(given)
    if isinstance(rows, str) or _is_message(rows):
        return [rows]
    if not _is_list(rows):
        must = "text, chat messages or token ids, or a list of them"
        raise TypeError(f"prompts is {given!r:.60} but must be {must}")
    if not rows:
        raise ValueError("prompts is empty but must hold at least one prompt")
    if all(_is_id(each) or _is_message(each) for each in rows):
        return [rows]
    if any(map(_is_message, rows)):
        raise TypeError("prompts mixes messages with prompts; give every chat as its own list")
    return list(rows)


def encode(prompt: Prompt, target: Target, index: int = 0) -> list[int]:
    """Turn text, chat messages or token ids into the ids of a prompt that fits the target.

    Text is tokenized as it is, with the tokenizer's special tokens; messages go through its chat
    template with a generation prompt; ids may be any array, or what a tokenizer returns.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, an id outside the
            vocabulary, or text without a tokenizer; it names the prompt by `index`.
        TypeError: something other than a prompt.
    """
    row = _unwrap(prompt)
    row = [row] if _is_message(row) else row
    if _is_list(row) and len(row) == 1 and isinstance(plain(row[0]), list):
        row = plain(row[0])  # a batch of one
    is_text = isinstance(row, str)
    if not is_text and not _is_list(row):
        raise TypeError(
            f"prompt {index} is {prompt!r:.60} but must be text, chat messages or token ids"
        )
    is_chat = bool(row) and isinstance(row[0], Mapping)
    for each in () if is_text else row:
        if not (_is_message(each) if is_chat else _is_id(each)):
            must = "{'role': ..., 'content': ...}" if is_chat else "a whole number"
            raise TypeError(f"prompt {index} holds {each!r:.60} but each entry must be {must}")
    if (is_text or is_chat) and target.tokenizer is None:
        raise ValueError(f"prompt {index} is text but the target has no tokenizer; pass ids")
    try:
        ids = tokenize(row, target.tokenizer) if is_text or is_chat else list(map(int, row))
    except Exception as error:  # of any template or tokenizer
        raise ValueError(f"prompt {index} cannot be tokenized: {error}") from error
    if not row or not ids:
        raise ValueError(f"prompt {index} is empty but needs at least one token to continue from")
    if len(ids) >= target.max_context_len:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens but the target's context holds "
            f"{target.max_context_len}, new tokens included; shorten the prompt"
        )
    if wrong := [token for token in ids if not 0 <= token < target.vocab_size]:
        raise ValueError(
            f"prompt {index} holds token {wrong[0]} but ids of this target are in "
            f"[0, {target.vocab_size}); was it encoded by another tokenizer?"
        )
    return ids


def tokenize(prompt: Any, tokenizer: Any) -> list[int]:
    """Return the ids of text or of chat messages, however many they are."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _unwrap(given: Any) -> Any:
    """Take off a tokenizer's wrapping and padding, and turn arrays into lists."""
    if not isinstance(given, Mapping) or "input_ids" not in given:
        return plain(given)
    ids, mask = given["input_ids"], given.get("attention_mask")
    try:
        return plain(ids) if mask is None else _without_padding(ids, mask)
    except (TypeError, ValueError) as error:
        raise ValueError("attention_mask must have the shape of input_ids") from error


def _without_padding(ids: Any, mask: Any) -> list[Any]:
    pairs = [(plain(each), is_real) for each, is_real in zip(plain(ids), plain(mask), strict=True)]
    if any(isinstance(each, list) for each, _ in pairs):
        return [_without_padding(each, is_real) for each, is_real in pairs]
    return [each for each, is_real in pairs if is_real]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_id(value: Any) -> bool:
    return type(plain(value)) is int


def _is_message(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping) and isinstance(value.get("role"), str)
    return is_mapping and ("tool_calls" in value or isinstance(value.get("content"), str | list))


class TextStream:
    """Turns tokens into text as they come, and never takes a piece back.

    Stop strings and what follows are not given out. Without a tokenizer all pieces are empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._num_settled = 0  # tokens whose text is known
        self._pending = ""  # text that was not given out yet

    def push(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Add tokens; returns the text that is settled now."""
        if self._tokenizer is None:
            return ""
        self._tokens.extend(tokens)
        # The settled tokens in front keep the tokenizer's spacing right at the seam.
        context = self._tokens[max(0, self._num_settled - 6) : self._num_settled]
        both = context + self._tokens[self._num_settled :]
        before = self._tokenizer.decode(context, skip_special_tokens=True)
        text = str(self._tokenizer.decode(both, skip_special_tokens=True))
        if is_last or not text.endswith("\ufffd"):  # half a character waits for its other bytes
            self._num_settled = len(self._tokens)
            self._pending += text[len(before) :]
        cut = first_stop(self._pending, self._stop)
        end = len(self._pending) if cut is None else cut
        if not is_last and cut is None:  # hold back what could begin a stop string
            starts = (stop[:size] for stop in self._stop for size in range(1, len(stop)))
            end -= max((len(each) for each in starts if self._pending.endswith(each)), default=0)
        settled, self._pending = self._pending[:end], self._pending[end:cut]
        return settled


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of the stop strings begins; None without one."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)
