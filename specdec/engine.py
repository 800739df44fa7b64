"""The scheduler of the one decoding loop: requests wait, join the running batch, and leave it.

First come first served: a request joins as soon as there is room for it, and none overtakes.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from specdec.batch import Batch
from specdec.cache_limit import CacheLimit
from specdec.draft_length import DraftLength
from specdec.interfaces import Drafter, HoldsCache, Target
from specdec.request import Prompt, Request, Result, StopRules, encode
from specdec.sampling_config import SamplingConfig
from specdec.text import TextStream
from specdec.verify import get_rule


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
    beside it.

    Args:
        target: the model whose distribution is kept.
        drafter: proposes tokens; None decodes plainly.
        max_rows: requests decoded together, at most.
        max_cache_bytes: of keys and values between two steps, the target's and the drafter's; what
            does not fit waits. While rows join, the new rows and half of the old cache stand there
            twice. None for no limit.
        rule: see `generate`.
        draft_length: see `generate`.

    Raises:
        ValueError: an option or a combination that cannot work, by name.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        max_rows: int = 16,
        max_cache_bytes: int | None = None,
        rule: str = "token",
        draft_length: DraftLength | None = None,
    ) -> None:
        _check(target, drafter, max_rows, rule)
        self.target, self.drafter, self.max_rows = target, drafter, max_rows
        self._batch = Batch(target, drafter, rule, draft_length)
        self._limit: CacheLimit | None = None
        if max_cache_bytes is not None:
            self._limit = CacheLimit(target, drafter, max_cache_bytes)
        owners: tuple[object, ...] = (target, drafter)
        self._caching = [owner for owner in owners if isinstance(owner, HoldsCache)]
        self.peak_cache_bytes = 0
        self._requests: dict[int, Request] = {}
        self._texts: dict[int, TextStream] = {}
        self._waiting: deque[Request] = deque()
        self._num_submitted = 0
        self._have_joined = False  # in the step before

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows of the running batch."""
        return len(self._batch.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now, as far as target and drafter tell."""
        return sum(owner.cache_bytes for owner in self._caching)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        max_time_s: float | None = None,
    ) -> int:
        """Put a request at the end of the queue; returns its id: 0, 1, ... in this order.

        Args:
            prompt: text, chat messages or token ids.
            sampling: its settings and its seed.
            max_new_tokens: tokens to emit at most; the context may end it earlier.
            stop: strings that end the text; they are cut off.
            max_time_s: seconds from now, after which it ends with what there is.

        Raises:
            ValueError: a prompt or an option that cannot work, or a request that can never fit
                into the cache's limit.
        """
        index = self._num_submitted
        if stop and self.target.tokenizer is None:
            raise ValueError("stop strings need a target with a tokenizer")
        rules = StopRules(max_new_tokens, tuple(stop), max_time_s)
        ids = encode(prompt, self.target, index)
        request = Request(index, ids, sampling, rules, self.target)
        if self._limit:
            self._limit.check(request)
        self._requests[index] = request
        self._texts[index] = TextStream(self.target.tokenizer, stop)
        self._waiting.append(request)
        self._num_submitted += 1
        return index

    def step(self) -> list[Chunk]:
        """Let requests join if there is room, or else decode one step of all rows.

        After some have joined, the rows that run have a step before others may join.

        Text that may still become a stop string or half a character is held back until it is
        settled.

        Returns:
            What is new: a chunk for every row that emitted tokens or ended; `index` is the id.
        """
        return [self._with_text(chunk) for chunk in self.advance()]

    def _with_text(self, chunk: Chunk) -> Chunk:
        text = self._texts[chunk.index].push(chunk.tokens, bool(chunk.finish_reason))
        return replace(chunk, text=text)

    @torch.inference_mode()
    def advance(self) -> list[Chunk]:
        """`step` for callers that need no text, which then costs nothing; `text` stays empty."""
        waits = self._have_joined and self._batch.rows
        joining = [] if waits else self._next()
        self._have_joined = bool(joining)
        if not joining and not self._batch.rows:
            return []
        news = self._batch.admit(joining) if joining else self._batch.step()
        ended = self._end_what_is_late()
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)
        self._batch.retire()
        told = {row.index for row, _ in news}
        news += [(row, 0) for row in ended if row.index not in told]
        return [_chunk(row, count) for row, count in news]

    def _next(self) -> list[Request]:
        """The requests that join now, in order."""
        rows, joining = self._batch.rows, list[Request]()
        for request in islice(self._waiting, self.max_rows - len(rows)):
            if self._limit and not self._limit.fits([*rows, *joining, request]):
                break
            joining.append(request)
        for _ in joining:
            self._waiting.popleft()
        if joining and self._limit:
            self._limit.reserve([*rows, *joining], join=bool(rows))
        return joining

    def _end_what_is_late(self) -> list[Request]:
        now = time.perf_counter()
        late = [r for r in [*self._batch.rows, *self._waiting] if r.deadline < now]
        for request in late:
            request.finish_reason = request.finish_reason or "time"
        if late:
            self._waiting = deque(r for r in self._waiting if not r.finish_reason)
        return late

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """End a request now, running or not; its result says "cancelled". No-op if it has ended.

        Raises:
            KeyError: no such request.
        """
        request = self._find(index)
        if request.finish_reason:
            return
        request.finish_reason = "cancelled"
        self._waiting = deque(r for r in self._waiting if r is not request)
        self._batch.retire()

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
        if index not in self._requests:
            raise KeyError(f"no request {index}: it was never submitted or its result was taken")
        return self._requests[index]


def _chunk(row: Request, count: int) -> Chunk:
    new = row.tokens[len(row.tokens) - count :]
    return Chunk(row.index, new, "", row.finish_reason or None)


def _check(target: Target, drafter: Drafter | None, max_rows: int, rule: str) -> None:
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
