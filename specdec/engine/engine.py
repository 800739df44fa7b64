"""The engine: requests come at any time, wait, join the running batch, and leave it."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdec.common.arguments import checked, fit, plain
from specdec.engine.batch import Batch
from specdec.engine.draft_length import DraftLength, Schedule
from specdec.engine.interfaces import Drafter, HoldsCache, Target, cache_owners, claim, claimed
from specdec.engine.request import Request, Result
from specdec.engine.scheduler import CacheLimit, Scheduler, is_out_of_memory
from specdec.engine.text import Prompt, encode
from specdec.registry import load_drafter, load_target
from specdec.sampling.config import SamplingConfig
from specdec.sampling.penalties import check_tokens
from specdec.verify import Rule, get_rule

# Where time goes with tokens, on a CPU, so many take a few plain steps and are read as fast as long
# prompts are; a GPU reads some hundreds in little more time than one.
JOIN_CHUNK, JOIN_CHUNK_OF_GPU = 128, 512

DraftLengths = DraftLength | Mapping[int, int | None] | int | None


@dataclass(frozen=True)
class Chunk:
    """New tokens of one prompt; `finish_reason` is None until its last chunk."""

    index: int
    tokens: list[int]
    text: str
    finish_reason: str | None


class Engine:
    """Decodes requests that come at any time, together.

    A request's output depends on its prompt, its sampling settings and its seed, not on what runs
    beside it; see `stream` for draft lengths that follow the batch.

    Args:
        target: the model whose distribution is kept.
        drafter: proposes tokens; None decodes plainly.
        max_rows: requests decoded together, at most.
        max_cache_bytes: bound of keys and values between two steps, the target's and the drafter's;
            a request that does not fit waits. While rows join, the new rows and half of the old
            cache stand there twice. None for no bound.
        join_chunk: tokens of joining prompts that running rows wait for between two steps, padding
            included; a longer prompt is read in parts of so many. None for 128, on a GPU 512.
        rule: as in `stream`.
        draft_length: as in `stream`.
        check: as in `stream`.

    Raises:
        ValueError: an option or a combination that cannot work, by name.
        RuntimeError: in `step`, while another loop has rows on this target or drafter.
    """

    observer: Any = None  # of one engine, or of all: its `observe` hears of every step

    @checked
    def __init__(
        self,
        target: Target | str,
        drafter: Drafter | Mapping[str, Any] | str | None = None,
        *,
        max_rows: int = 16,
        max_cache_bytes: int | None = None,
        join_chunk: int | None = None,
        rule: str | Rule = "token",
        draft_length: DraftLengths = None,
        check: bool = False,
    ) -> None:
        target = resolve_target(target)
        if isinstance(drafter, str | Mapping):
            drafter = load_drafter(drafter, target)
        elif drafter is not None:
            _require_members("drafter", drafter, Drafter, "load_drafter, or None")
        _check_combination(target, drafter, max_rows, rule)
        default = JOIN_CHUNK if target.device.type == "cpu" else JOIN_CHUNK_OF_GPU
        self._join_chunk = default if join_chunk is None else join_chunk
        if self._join_chunk < 1:
            raise ValueError(f"join_chunk is {join_chunk} but must be at least 1, or None")
        self.target, self.drafter = target, drafter
        self._batch = Batch(target, drafter, rule, _resolve_draft_length(draft_length), check)
        self._limit: CacheLimit | None = None
        if max_cache_bytes is not None:
            with claimed(*self._batch.owners):  # it frees what they have cached
                self._limit = CacheLimit(target, drafter, max_cache_bytes)
        self._scheduler = Scheduler(max_rows, self._limit)
        self._requests: dict[int, Request] = {}
        self._num_submitted = 0
        self._ended: list[Request] = []  # outside a step; the next one tells the caller
        owners: tuple[object, ...] = (target, drafter)
        self._caches = [owner for owner in owners if isinstance(owner, HoldsCache)]
        self.peak_cache_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Requests that have no row: not begun, their prompts read in part, or preempted."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Rows of the running batch."""
        return len(self._batch.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now, as far as target and drafter tell."""
        return sum(owner.cache_bytes for owner in self._caches)

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
            ValueError: a prompt or an option that cannot work, or a request that never fits.
        """
        index, sampling = self._num_submitted, SamplingConfig.of(sampling)
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        ids = encode(prompt, self.target, index)
        check_tokens(sampling, self.target.vocab_size, index)
        request = Request(index, ids, sampling, self.target, max_new_tokens, stop, max_time_s)
        if self._limit:
            self._limit.check(request)
        self._requests[index] = request
        self._scheduler.waiting.append(request)
        self._num_submitted += 1
        return index

    def step(self) -> list[Chunk]:
        """Let requests join if there is room, or else decode one step of all rows.

        A long prompt joins running rows in parts, one a call, with a step of these in between.

        Returns:
            A chunk for every row that emitted tokens or ended; `index` is the id. Text that may
            still become a stop string or half a character is held back until it is settled.

        Raises:
            Exception: any error of target or drafter. The next step may be taken all the same: no
                request and no token is lost. All rows go back to the queue. Without memory fewer
                run together from then on; any other error ends those that were joining, or all
                rows if none was, and the next step tells who.
        """
        chunks = self.advance()
        streams = [self._requests[chunk.index].text_stream for chunk in chunks]
        return [
            replace(chunk, text=stream.push(chunk.tokens, bool(chunk.finish_reason)))
            for chunk, stream in zip(chunks, streams, strict=True)
        ]

    @torch.inference_mode()
    def advance(self) -> list[Chunk]:
        """Do a `step` for callers that need no text, which then costs nothing: it stays empty."""
        running = list(self._batch.rows)
        if self.num_waiting and not running:  # rows that run hold the claim
            claim(self._batch.owners, self._batch)
        is_bound = bool(running or self._batch.half_read)
        joining = self._scheduler.schedule(running, self._join_chunk if is_bound else None)
        with self._preempting_on_error(running, joining):
            if joining and running and self._limit:
                self._limit.reserve(running, join=True, apart=joining)
            if joining and self._batch.prefill_ahead(joining, self._join_chunk):
                self._scheduler.requeue(joining)
                joining = []
            elif joining:
                if self._limit:
                    self._limit.reserve([*running, *joining], join=bool(running))
                self._batch.admit(joining)
            elif running:
                self._batch.step()
            now = time.perf_counter()
            for request in [*self._batch.rows, *self._scheduler.waiting]:
                if request.deadline < now:
                    request.finish_reason = request.finish_reason or "time"
            self._ended += self._scheduler.remove_ended()
            self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)
            self._batch.retire()
        chunks = []
        for row in [*running, *joining, *self._ended]:
            new = row.tokens[row.num_reported :]
            if (new or row.finish_reason) and row.index in self._requests:
                row.num_reported = len(row.tokens)
                chunks.append(Chunk(row.index, new, "", row.finish_reason or None))
        self._ended = []
        if self.observer:
            self.observer.observe(self, [self._requests[chunk.index] for chunk in chunks])
        return chunks

    @contextmanager
    def _preempting_on_error(
        self, running: Sequence[Request], joining: Sequence[Request]
    ) -> Iterator[None]:
        # What a failure left in the caches is not known: a prefill as a new batch mends it.
        try:
            yield
        except BaseException as error:
            if is_out_of_memory(error):  # a prompt read in part has its share in it
                joining = joining or self._batch.half_read
            self._batch.clear()
            self._ended += self._scheduler.preempt(running, joining, error)
            raise

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """End a request now, running or not; its result says "cancelled". No-op if it has ended.

        Errors of the target or the drafter are as in `step`; the request has ended all the same.
        """
        request = self._find(index)
        if request.finish_reason:
            return
        request.finish_reason = "cancelled"
        self._scheduler.remove_ended()
        with self._preempting_on_error(list(self._batch.rows), []):
            self._batch.retire()
        if self.observer:
            self.observer.observe(self, [request])

    def preempt(self) -> None:
        """Send all rows back to the queue and leave target and drafter to other loops."""
        self._scheduler.requeue(self._batch.rows)
        self._batch.clear()

    def peek(self, index: int) -> Result:
        """Return what there is of a request; an unfinished one says "interrupted"."""
        return self._find(index).result()

    def result(self, index: int) -> Result:
        """Return the result of a request that has ended; the engine forgets it.

        Raises:
            KeyError: no such request.
            ValueError: it has not ended.
        """
        request = self._find(index)
        if not request.finish_reason:
            raise ValueError(f"request {index} has not ended; call step() until it has, or cancel")
        return self._requests.pop(request.index).result()

    def _find(self, index: int) -> Request:
        index = fit("index", index, int)
        if index not in self._requests:
            raise KeyError(f"no request {index}: it was never submitted or its result was taken")
        return self._requests[index]


def resolve_target(given: Target | str) -> Target:
    """Return a target as it is, and load the one that a string names."""
    if isinstance(given, str | os.PathLike):
        return load_target(os.fspath(given))
    hint = "wrap it: HFTarget(model, tokenizer)" if hasattr(given, "generate") else "load_target"
    _require_members("target", given, Target, hint)
    return given


def _resolve_draft_length(given: DraftLengths) -> DraftLength | None:
    given = plain(given)
    if type(given) is int or isinstance(given, Mapping):
        return Schedule({1: given} if isinstance(given, int) else given)
    if given is not None:
        hint = "a whole number, a mapping from batch sizes to numbers, a Schedule or None"
        _require_members("draft_length", given, DraftLength, hint)
    return given  # type: ignore[return-value]


def _require_members(name: str, given: Any, protocol: Any, hint: str) -> None:
    members = [*protocol.__annotations__, *(each for each in vars(protocol) if each[0] != "_")]
    missing = [member for member in members if not hasattr(given, member)]
    if missing or isinstance(given, type):
        raise TypeError(
            f"{name} is {given!r:.80} but must be a {protocol.__module__}.{protocol.__name__}; it "
            f"lacks {', '.join(missing) or 'none of its members'}; use {hint}"
        )


def _check_combination(
    target: Target, drafter: Drafter | None, max_rows: int, rule: str | Rule
) -> None:
    """Refuse what the target, the drafter and the rule cannot do together."""
    can = target.capabilities
    makes_trees = drafter is not None and drafter.makes_trees
    no_chain = makes_trees and not get_rule(rule).supports_trees
    is_crowded = max_rows > 1 and not can.batched
    faults = [
        (max_rows < 1, f"max_rows is {max_rows} but must be at least 1"),
        (is_crowded, f"max_rows or batch_size is {max_rows} but this target takes one row"),
        (no_chain, f"rule {rule!r} judges chains only but this drafter makes trees"),
        (
            makes_trees and not can.trees,
            "this target scores chains only but the drafter makes trees",
        ),
    ]
    num_layers = getattr(getattr(target, "config", None), "num_hidden_layers", float("inf"))
    for each in cache_owners(drafter):
        size, taps = getattr(each, "vocab_size", target.vocab_size), getattr(each, "taps", ())
        wrong = [tap for tap in taps if not can.first_tap <= tap <= num_layers or not can.taps]
        is_other = size != target.vocab_size and isinstance(each, Drafter)
        name, fix = type(each).__name__, "load a drafter for this target"
        sizes = f"vocab_size of this {name} is {size}, the target's {target.vocab_size}; {fix}"
        states = f"taps of this {name} are {tuple(taps)} but the target has no {wrong}; {fix}"
        if min(wrong, default=0) < 0:
            states += ", that reads hidden states and not keys and values (-1)"
        faults += [(is_other, sizes), (bool(wrong), states)]
    for is_fault, message in faults:
        if is_fault:
            raise ValueError(message)
