"""The scheduler of the one decoding loop: requests wait, join the running batch, and leave it.

First come first served: a request joins as soon as there is room for it, and none overtakes.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdec.engine.batch import Batch
from specdec.engine.draft_length import DraftLength, Schedule
from specdec.engine.interfaces import Drafter, HoldsCache, Target, cache_owners, claim, claimed
from specdec.engine.request import Prompt, Request, Result, StopRules, encode, sampling_of
from specdec.engine.scheduler import CacheLimit, WaitingLine
from specdec.engine.text import TextStream
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig, checked, fit, plain
from specdec.sampling.sampler import Sampler
from specdec.verify import Rule, get_rule


@dataclass(frozen=True)
class Chunk:
    """What one step added to one prompt; `finish_reason` is None until its last chunk."""

    index: int
    tokens: list[int]
    text: str
    finish_reason: str | None


class Engine:
    """Decodes requests that come at any time, together.

    A request's output depends on its prompt, its sampling settings and its seed, not on what runs
    beside it; see `generate` for draft lengths that follow the batch.

    Args:
        target: the model whose distribution is kept.
        drafter: proposes tokens; None decodes plainly.
        max_rows: requests decoded together, at most.
        max_cache_bytes: of keys and values between two steps, the target's and the drafter's; what
            does not fit waits. While rows join, the new rows and half of the old cache stand there
            twice. None for no limit.
        rule: see `generate`.
        draft_length: see `generate`.
        check: see `generate`.

    Raises:
        ValueError: an option or a combination that cannot work, by name.
        RuntimeError: of `step`, while another loop has rows on this target or drafter.
    """

    @checked
    def __init__(
        self,
        target: Target | str,
        drafter: Drafter | Mapping[str, Any] | str | None = None,
        *,
        max_rows: int = 16,
        max_cache_bytes: int | None = None,
        rule: str | Rule = "token",
        draft_length: DraftLength | Mapping[int, int | None] | int | None = None,
        check: bool = False,
    ) -> None:
        target = target_of(target)
        drafter = drafter_of(drafter, target)
        _check(target, drafter, max_rows, rule)
        self.target, self.drafter = target, drafter
        self._batch = Batch(target, drafter, rule, draft_length_of(draft_length), check)
        self._limit: CacheLimit | None = None
        if max_cache_bytes is not None:
            with claimed(*self._batch.owners):  # it frees what they have cached
                self._limit = CacheLimit(target, drafter, max_cache_bytes)
        owners: tuple[object, ...] = (target, drafter)
        self._caching = [owner for owner in owners if isinstance(owner, HoldsCache)]
        self.peak_cache_bytes = 0
        self._requests: dict[int, Request] = {}
        self._texts: dict[int, TextStream] = {}
        self._waiting = WaitingLine(max_rows, self._limit)
        self._untold = list[Request]()  # ended, and the caller has not been told
        self._num_submitted = 0
        self._have_joined = False  # in the step before

    @property
    def num_waiting(self) -> int:
        """Requests that have no row: they have not begun, or have to begin again."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows of the running batch."""
        return len(self._batch.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now, as far as target and drafter tell."""
        return sum(owner.cache_bytes for owner in self._caching)

    @checked
    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        max_time_s: float | None = None,
    ) -> int:
        """Put a request at the end of the queue; returns its id: 0, 1, ... in this order.

        Args:
            prompt: text, chat messages or token ids.
            sampling: its settings and its seed, as a configuration or its fields; None is greedy.
            max_new_tokens: tokens to emit at most; the context may end it earlier.
            stop: strings that end the text; they are cut off.
            max_time_s: seconds from now, after which it ends with what there is.

        Raises:
            ValueError: a prompt or an option that cannot work, or a request that can never fit
                into the cache's limit.
        """
        index, sampling = self._num_submitted, sampling_of(sampling)
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if stop and self.target.tokenizer is None:
            raise ValueError("stop strings need a target with a tokenizer")
        rules = StopRules(max_new_tokens, stop, max_time_s)
        ids = encode(prompt, self.target, index)
        Sampler([sampling], self.target.vocab_size, "cpu", [ids], ())  # refuses ids out of range
        request = Request(index, ids, sampling, rules, self.target)
        if self._limit:
            self._limit.check(request)
        self._requests[index] = request
        self._texts[index] = TextStream(self.target.tokenizer, stop)
        self._waiting.add(request)
        self._num_submitted += 1
        return index

    def step(self) -> list[Chunk]:
        """Let requests join if there is room, or else decode one step of all rows.

        After some have joined, the rows that run have a step before others may join.

        Text that may still become a stop string or half a character is held back until it is
        settled.

        Returns:
            What is new: a chunk for every row that emitted tokens or ended; `index` is the id.

        Raises:
            Exception: what target or drafter raise. The next step may be taken all the same: no
                request and no token is lost. All rows go back to the head of the queue and begin
                again, which caches what they have anew. Where memory ran out, fewer run together
                until those that had no room have ended; one that has none even alone ends with an
                error. Any other error ends those that were joining, or all rows if none was. What
                has ended like this is told by the next step.
        """
        return [self._with_text(chunk) for chunk in self.advance()]

    def _with_text(self, chunk: Chunk) -> Chunk:
        text = self._texts[chunk.index].push(chunk.tokens, bool(chunk.finish_reason))
        return replace(chunk, text=text)

    @torch.inference_mode()
    def advance(self) -> list[Chunk]:
        """`step` for callers that need no text, which then costs nothing; `text` stays empty."""
        if self.num_running or self.num_waiting:
            claim(self._batch.owners, self._batch)
        waits = self._have_joined and self._batch.rows
        joining = [] if waits else self._waiting.take(self._batch.rows)
        self._have_joined = bool(joining)
        rows = [*self._batch.rows, *joining]
        with self._beginning_again(rows, joining):
            if joining:
                self._admit(joining)
            elif rows:
                self._batch.step()
            self._end_what_is_late()
            self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)
            self._batch.retire()
        return self._tell(rows)

    def _admit(self, joining: list[Request]) -> None:
        running = self._batch.rows
        if self._limit:
            self._limit.reserve([*running, *joining], join=bool(running))
        self._batch.admit(joining)

    @contextmanager
    def _beginning_again(self, rows: list[Request], joining: list[Request]) -> Iterator[None]:
        """If this fails, all rows wait again: a prefill as a new batch mends what is half done."""
        try:
            yield
        except BaseException as error:
            self._batch.forget()
            self._untold += self._waiting.take_back(rows, joining, error)
            raise

    def _end_what_is_late(self) -> None:
        now = time.perf_counter()
        for request in [*self._batch.rows, *self._waiting]:
            if request.deadline < now:
                request.finish_reason = request.finish_reason or "time"
        self._untold += self._waiting.drop_ended()

    def _tell(self, rows: list[Request]) -> list[Chunk]:
        """What these rows have that the caller does not know, and what ended besides."""
        due, self._untold = [*rows, *self._untold], []
        news = [row for row in due if row.finish_reason or len(row.tokens) > row.num_told]
        return [_chunk(row) for row in news if row.index in self._requests]

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """End a request now, running or not; its result says "cancelled". No-op if it has ended.

        Raises:
            KeyError: no such request.
            Exception: see `step`; the request has ended all the same.
        """
        request = self._find(index)
        if request.finish_reason:
            return
        request.finish_reason = "cancelled"
        self._waiting.drop_ended()
        with self._beginning_again(self._batch.rows, []):
            self._batch.retire()

    def _pause(self) -> None:
        """Leave target and drafter to others; all rows begin again at the next step."""
        rows = self._batch.rows
        self._batch.forget()
        self._untold += self._waiting.take_back(rows, [], GeneratorExit())

    def peek(self, index: int) -> Result:
        """What there is of a request; an unfinished one says "interrupted".

        Raises:
            KeyError: no such request.
        """
        return self._find(index).result()

    def result(self, index: int) -> Result:
        """The result of a request that has ended; the engine forgets it.

        Raises:
            KeyError: no such request.
            ValueError: it has not ended.
        """
        request = self._find(index)
        if not request.finish_reason:
            raise ValueError(f"request {index} has not ended; call step() until it has, or cancel")
        del self._requests[index], self._texts[index]
        return request.result()

    def _find(self, index: int) -> Request:
        index = fit("index", index, int)
        if index not in self._requests:
            raise KeyError(f"no request {index}: it was never submitted or its result was taken")
        return self._requests[index]


def target_of(given: Target | str) -> Target:
    """A target, or the one that a name loads."""
    if isinstance(given, str | os.PathLike):
        from specdec.targets.load import load_target

        return load_target(given)
    hint = "wrap it: HFTarget(model, tokenizer)" if hasattr(given, "generate") else "load_target"
    _require_members("target", given, Target, hint)
    return given


def drafter_of(given: Drafter | Mapping[str, Any] | str | None, target: Target) -> Drafter | None:
    """A drafter, or the one that options of `load_drafter` build; None decodes plainly."""
    if isinstance(given, str | Mapping):
        return load_drafter(given, target)
    if given is not None:
        _require_members("drafter", given, Drafter, "load_drafter, or None for plain decoding")
    return given


def _require_members(name: str, given: Any, protocol: Any, hint: str) -> None:
    members = [*protocol.__annotations__, *(each for each in vars(protocol) if each[0] != "_")]
    missing = [member for member in members if not hasattr(given, member)]
    if missing or isinstance(given, type):
        what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)[:80]
        raise TypeError(
            f"{name} is {what} but must be an object with the members of "
            f"{protocol.__module__}.{protocol.__name__}; it lacks {', '.join(missing) or 'none'}; "
            f"use {hint}"
        )


def draft_length_of(given: Any) -> Any:
    """A draft length; a number is one for all batch sizes, a mapping a `Schedule`."""
    given = plain(given)
    if isinstance(given, int) and not isinstance(given, bool):
        given = {1: given}
    if isinstance(given, Mapping):
        return Schedule(given)
    if given is not None:
        hint = "a whole number, a mapping from batch sizes to numbers, a Schedule or None"
        _require_members("draft_length", given, DraftLength, hint)
    return given


def _chunk(row: Request) -> Chunk:
    new, row.num_told = row.tokens[row.num_told :], len(row.tokens)
    return Chunk(row.index, new, "", row.finish_reason or None)


def _check(target: Target, drafter: Drafter | None, max_rows: int, rule: str | Rule) -> None:
    """Refuse what the target or the rule cannot do."""
    if max_rows < 1:
        raise ValueError(f"max_rows is {max_rows} but must be at least 1")
    if max_rows > 1 and not target.capabilities.batched:
        raise ValueError(f"max_rows is {max_rows} but this target takes one row; set it to 1")
    chosen_rule = get_rule(rule)
    makes_trees = drafter is not None and drafter.makes_trees
    if makes_trees and not chosen_rule.supports_trees:
        raise ValueError(f"rule {rule!r} judges chains only but this drafter makes trees")
    if makes_trees and not target.capabilities.trees:
        raise ValueError("this target scores chains only but the drafter makes trees")
    for each in cache_owners(drafter):
        _check_made_for(each, target)


def _check_made_for(drafter: object, target: Target) -> None:
    """Refuse a drafter of another vocabulary, or one that reads what this target does not show."""
    vocab_size = getattr(drafter, "vocab_size", target.vocab_size)
    num_layers = getattr(getattr(target, "config", None), "num_hidden_layers", float("inf"))
    if vocab_size != target.vocab_size and isinstance(drafter, Drafter):
        raise ValueError(
            f"vocab_size of this {type(drafter).__name__} is {vocab_size} but the target's is "
            f"{target.vocab_size}; load a drafter for this target"
        )
    taps = getattr(drafter, "taps", ())
    wrong = [tap for tap in taps if not 0 <= tap <= num_layers or not target.capabilities.taps]
    if wrong:
        raise ValueError(
            f"taps of this {type(drafter).__name__} are {tuple(taps)} but the target has no hidden "
            f"states {wrong}; load a drafter for this target"
        )
