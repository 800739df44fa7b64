"""One prompt on its way: its tokens, its limits, and the rules that end it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from specdec.engine.interfaces import Target
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.sampling.config import SamplingConfig, plain

# Numbers may stand in any array, and a mapping is what a tokenizer returns, or a message.
Prompt = str | Sequence[int] | Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StopRules:
    """When a row ends, besides the target's context.

    Attributes:
        max_new_tokens: tokens to emit at most, at least 1.
        stop: strings; the text ends before the first of them.
        max_time_s: seconds from the request on; None for no limit.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    max_time_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} but must be at least 1")
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop!r} but an empty string ends every text; drop it")
        if self.max_time_s is not None and self.max_time_s <= 0:
            raise ValueError(f"max_time_s is {self.max_time_s} but must be positive, or None")


@dataclass(frozen=True)
class Result:
    """What one prompt gave.

    Attributes:
        prompt_tokens: the prompt's ids.
        tokens: the emitted ids, an end-of-sequence token included.
        text: their text, special tokens skipped, cut before a stop string; "" without a tokenizer.
        finish_reason: "eos", "stop", "length" (max_new_tokens or the context is full), "time",
            "cancelled", "error" or "interrupted".
        records: one per verify step.
        ttft_s: seconds from the start of its own prefill to the first token; 0 if there was none.
        decode_s: seconds from the first token to the last.
        queue_s: seconds from the request to the start of its prefill; 0 if there was none.
        error: why it failed; "" if it did not.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    records: list[StepRecord]
    ttft_s: float
    decode_s: float
    queue_s: float = 0.0
    error: str = ""

    @property
    def stats(self) -> AcceptanceStats:
        """Acceptance over this prompt's steps."""
        return AcceptanceStats.from_records(self.records)

    @property
    def decode_tokens_per_s(self) -> float:
        """(T - 1) / decode_s; nan if fewer than two tokens were emitted."""
        num_tokens = len(self.tokens) - 1
        return num_tokens / self.decode_s if num_tokens > 0 and self.decode_s > 0 else float("nan")


def sampling_of(given: Any) -> SamplingConfig:
    """A configuration; None is the default, and a mapping holds its fields."""
    if isinstance(given, SamplingConfig):
        return given
    try:
        return SamplingConfig(**({} if given is None else given))
    except TypeError as error:
        raise TypeError(
            f"sampling is {given!r} but must be a SamplingConfig, its fields or None: {error}"
        ) from error


def prompts_of(given: Any) -> list[Any]:
    """Prompts in a list, one for a single text, chat or row of ids; `encode` checks each."""
    rows = _unpacked(given)
    if isinstance(rows, str) or _is_message(rows):
        return [rows]
    if not isinstance(rows, Sequence) or isinstance(rows, bytes):
        raise TypeError(
            f"prompts is {type(given).__name__} {given!r:.60} but must be a list of prompts, each "
            "text, chat messages or token ids, or one of these"
        )
    if not rows:
        raise ValueError("prompts is empty but must hold at least one prompt")
    if all(_is_id(each) or _is_message(each) for each in rows):
        return [rows]
    if any(_is_message(each) for each in rows):
        raise TypeError("prompts mixes messages with prompts; give every chat as its own list")
    return list(rows)


def _prompt_of(given: Any, index: int) -> Any:
    """One prompt as a string, a list of ids or a list of messages."""
    row = _unpacked(given)
    row = [row] if _is_message(row) else row
    if isinstance(row, Sequence) and len(row) == 1 and isinstance(plain(row[0]), list):
        row = plain(row[0])  # a batch of one
    if isinstance(row, str):
        return row
    if not isinstance(row, Sequence) or isinstance(row, bytes):
        raise TypeError(
            f"prompt {index} is {given!r:.60} but must be text, chat messages or token ids"
        )
    is_chat = bool(row) and isinstance(row[0], Mapping)
    for each in row:
        if not (_is_message(each) if is_chat else _is_id(each)):
            must = "{'role': ..., 'content': ...}" if is_chat else "a whole number"
            raise TypeError(f"prompt {index} holds {each!r:.60} but each entry must be {must}")
    return list(row) if is_chat else [int(each) for each in row]


def _unpacked(given: Any) -> Any:
    """Without a tokenizer's wrapping and padding, and arrays as lists."""
    if not isinstance(given, Mapping) or "input_ids" not in given:
        return plain(given)
    ids, mask = given["input_ids"], given.get("attention_mask")
    try:
        return plain(ids) if mask is None else _without_padding(ids, mask)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "attention_mask must have the shape of input_ids, as tokenizers return it"
        ) from error


def _without_padding(ids: Any, mask: Any) -> list[Any]:
    pairs = [(plain(each), is_real) for each, is_real in zip(plain(ids), plain(mask), strict=True)]
    is_batch = any(isinstance(each, list) for each, _ in pairs)
    return [
        _without_padding(each, is_real) if is_batch else each
        for each, is_real in pairs
        if is_batch or is_real
    ]


def _is_id(value: Any) -> bool:
    return type(value) is int or type(plain(value)) is int


def _is_message(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping) and isinstance(value.get("role"), str)
    return is_mapping and ("tool_calls" in value or isinstance(value.get("content"), str | list))


def encode(prompt: Prompt, target: Target, index: int = 0) -> list[int]:
    """Turn text, chat messages or token ids into the ids of a prompt that fits the target.

    Text is tokenized as it is, with the tokenizer's special tokens; messages go through its chat
    template with a generation prompt.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, an id outside the
            vocabulary, or text without a tokenizer.
    """
    ids = _prompt_of(prompt, index)
    if isinstance(ids, str) or (ids and isinstance(ids[0], Mapping)):
        if target.tokenizer is None:
            raise ValueError(f"prompt {index} is text but the target has no tokenizer; pass ids")
        try:
            ids = ids and tokenize(ids, target.tokenizer)
        except Exception as error:  # of any template or tokenizer
            raise ValueError(f"prompt {index} cannot be tokenized: {error}") from error
    if not ids:
        raise ValueError(f"prompt {index} is empty but needs at least one token to continue from")
    if len(ids) >= target.max_context_len:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens but the target's context holds "
            f"{target.max_context_len}, new tokens included; shorten the prompt"
        )
    wrong = next((token for token in ids if not 0 <= token < target.vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"prompt {index} holds token {wrong} but ids of this target are in "
            f"[0, {target.vocab_size}); was it encoded by another tokenizer?"
        )
    return ids


def tokenize(prompt: Any, tokenizer: Any) -> list[int]:
    """Ids of text or of chat messages, however many they are."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(eq=False)
class Request:
    """A row of the batch, as the host sees it."""

    index: int
    prompt: list[int]
    sampling: SamplingConfig
    rules: StopRules
    target: Target
    tokens: list[int] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    num_told: int = 0  # tokens that the caller has been given

    def __post_init__(self) -> None:
        room = self.target.max_context_len - len(self.prompt)
        self.max_tokens = min(self.rules.max_new_tokens, room)
        self.deadline = self.submitted + (self.rules.max_time_s or float("inf"))
        self._eos = frozenset(self.target.eos_token_ids)

    @property
    def budget(self) -> int:
        """Draft tokens that can still be kept: one place is the step's own token's."""
        return max(0, self.max_tokens - len(self.tokens) - 1)

    def accept(self, new_tokens: list[int]) -> int:
        """Add tokens until a stop rule holds; returns how many were kept."""
        kept = 0
        for token in new_tokens:
            self.tokens.append(token)
            kept += 1
            if token in self._eos:
                self.finish_reason = "eos"
            elif self.rules.stop and self._stopped():
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        self.last_token = time.perf_counter()
        if not self.first_token:
            self.first_token = self.last_token
        return kept

    def fail(self, reason: str) -> None:
        """End with an error."""
        self.finish_reason, self.error = "error", reason

    def _stopped(self) -> bool:
        # A token is at least one byte, so a stop string spans at most this many tokens.
        window = max(len(stop.encode(errors="surrogatepass")) for stop in self.rules.stop) + 1
        tail = self.target.tokenizer.decode(self.tokens[-window:], skip_special_tokens=True)
        return any(stop in tail for stop in self.rules.stop)

    def result(self) -> Result:
        """What there is now; an unfinished row was interrupted."""
        return Result(
            prompt_tokens=self.prompt,
            tokens=self.tokens,
            text=self._final_text(),
            finish_reason=self.finish_reason or "interrupted",
            records=self.records,
            ttft_s=self.first_token - self.started if self.first_token else 0.0,
            decode_s=self.last_token - self.first_token,
            queue_s=self.started - self.submitted if self.started else 0.0,
            error=self.error,
        )

    def _final_text(self) -> str:
        if self.target.tokenizer is None:
            return ""
        text: str = self.target.tokenizer.decode(self.tokens, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.rules.stop] if self.finish_reason == "stop" else []
        found = [end for end in ends if end >= 0]
        return text[: min(found)] if found else text
