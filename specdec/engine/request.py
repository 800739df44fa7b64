"""One prompt on its way: its tokens, the rules that end it, and its result."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.engine.interfaces import Target
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.engine.text import TextStream, first_stop
from specdec.sampling.config import SamplingConfig


@dataclass(frozen=True)
class Result:
    """The outcome of one prompt.

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


@dataclass(eq=False)
class Request:
    """A prompt (ids) that waits or runs, as the host sees it; its options are `Engine.submit`'s."""

    index: int
    prompt: list[int]
    sampling: SamplingConfig
    target: Target
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    max_time_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    num_reported: int = 0  # tokens that the caller has been given
    # Times of its submission, its first prefill, its first token and its last one; 0 for none.
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        count, limit, tokenizer = self.max_new_tokens, self.max_time_s, self.target.tokenizer
        if count < 1:
            raise ValueError(f"max_new_tokens is {count} but must be at least 1")
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop!r} but an empty string ends every text; drop it")
        if self.stop and tokenizer is None:
            raise ValueError("stop strings need a target with a tokenizer")
        if limit is not None and limit <= 0:
            raise ValueError(f"max_time_s is {limit} but must be positive, or None")
        self.max_tokens = min(count, self.target.max_context_len - len(self.prompt))
        self.deadline = self.submitted + (limit or float("inf"))
        self.text_stream = TextStream(tokenizer, self.stop)
        self._eos = frozenset(self.target.eos_token_ids)
        # A token is at least one byte, so a stop string spans at most this many tokens.
        longest = max((len(s.encode(errors="surrogatepass")) for s in self.stop), default=0)
        self._stop_window = longest + 1

    @property
    def budget(self) -> int:
        """Draft tokens that can still be kept: one place is the step's own token's."""
        return max(0, self.max_tokens - len(self.tokens) - 1)

    def accept(self, new_tokens: Sequence[int]) -> int:
        """Add tokens until a stop rule holds; returns how many were kept."""
        kept = 0
        for token in new_tokens:
            self.tokens.append(token)
            kept += 1
            if token in self._eos:
                self.finish_reason = "eos"
            elif self.stop and first_stop(self._text(self._stop_window), self.stop) is not None:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        return kept

    def _text(self, num_last: int = 0) -> str:
        """Return the text of the last tokens, 0 for all."""
        tokens = self.tokens[-num_last:]
        return str(self.target.tokenizer.decode(tokens, skip_special_tokens=True))

    def fail(self, reason: str) -> None:
        """End with an error."""
        self.finish_reason, self.error = "error", reason

    def result(self) -> Result:
        """Return what there is now; an unfinished request was interrupted."""
        text = "" if self.target.tokenizer is None else self._text()
        if self.finish_reason == "stop":
            text = text[: first_stop(text, self.stop)]
        return Result(
            prompt_tokens=self.prompt,
            tokens=self.tokens,
            text=text,
            finish_reason=self.finish_reason or "interrupted",
            records=self.records,
            ttft_s=self.first_token - self.started if self.first_token else 0.0,
            decode_s=self.last_token - self.first_token,
            queue_s=self.started - self.submitted if self.started else 0.0,
            error=self.error,
        )
