"""The contract of the loop with a target and a drafter. Any object with these members fits.

Shapes: B rows, N draft nodes, V target vocabulary, H hidden size.
Invariant: the cache of a target holds all committed tokens but the last, the *root*, which the
next `score` feeds together with the draft.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from specdec.engine.metrics import ForwardClock
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict

Prompts = Sequence[Sequence[int]]
KEYS_VALUES = -1  # the tap that holds a target's keys and values, not one of its hidden states


@dataclass(frozen=True)
class Capabilities:
    """Abilities of a target beyond scoring one chain for one row.

    Attributes:
        trees: it accepts drafts with parents.
        batched: it accepts more than one row, with ragged lengths.
        taps: it returns hidden states.
        first_tap: lowest of them; `KEYS_VALUES` where it returns that too.
    """

    trees: bool = True
    batched: bool = True
    taps: bool = True
    first_tap: int = 0


@dataclass(frozen=True)
class TargetOutput:
    """One forward of the target.

    Attributes:
        logits: [B, M, V]; M = 1 after prefill (the last prompt token of every row), N + 1 after
            score (row 0 follows the root, row i + 1 follows node i).
        hidden: tap -> [B, M', H]; M' is the padded prompt length after prefill, N + 1 after score.
            Tap h is Hugging Face `hidden_states[h]`: 0 the embeddings, L after the final norm.
            `KEYS_VALUES` is the cache's part of the same tokens, [B, M', L * kv heads * 2 *
            head_dim]: layer by layer, each head's key as attention reads it, then its value.
    """

    logits: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)


@runtime_checkable
class Target(Protocol):
    """The model whose distribution is kept. It owns its KV cache and nothing else."""

    vocab_size: int
    max_context_len: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    tokenizer: Any
    capabilities: Capabilities
    clock: ForwardClock

    def prefill(
        self, prompts: Prompts, taps: Sequence[int] = (), *, join: bool = False
    ) -> TargetOutput:
        """Cache every prompt whole, as a new batch; the batch before is forgotten.

        With `join` the prompts become the last rows of the running batch instead. The output is
        that of the new prompts alone.
        """

    def score(self, root: Tensor, draft: Draft, taps: Sequence[int] = ()) -> TargetOutput:
        """Run one forward over root [B] and the draft's nodes [B, N]."""

    def commit(self, verdict: Verdict, num_accepted: Sequence[int]) -> None:
        """Keep root and accepted path in the cache, drop the rest; `num_accepted` on the host."""

    def reorder(self, rows: Tensor) -> None:
        """Keep only `rows` (int64, each at most once) of the batch, in that order."""


@runtime_checkable
class Drafter(Protocol):
    """A proposer of continuations of the root. It owns its own cache and nothing else."""

    taps: tuple[int, ...]
    max_nodes: int
    makes_trees: bool
    clock: ForwardClock

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Start a new batch, after the target's prefill; the batch before is forgotten.

        Each of `prompts` ends with its row's root, the first token sampled; `output` is the
        target's of the tokens before it. With `join` the prompts become the last rows of the
        running batch instead; `output` and `sampler` are those of the new rows alone.
        """

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Draft at most `budget[b]` nodes after `root[b]`; 0 asks for none in that row.

        A token must have been drawn from the q it reports in `Draft.probs`; chosen tokens
        (argmax, top-k, lookup) report `probs=None`.
        """

    def observe(
        self,
        verdict: Verdict,
        committed: Sequence[Sequence[int]],
        hidden: dict[int, Tensor],
    ) -> None:
        """Learn what was kept: the verdict on the device, its new tokens on the host."""

    def reorder(self, rows: Tensor) -> None:
        """Keep only `rows` (int64, each at most once) of the batch, in that order."""


@runtime_checkable
class HoldsCache(Protocol):
    """A target or a drafter whose cache an engine can keep under a limit, and clean."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now."""

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """Return the bytes for so many rows with so many tokens each.

        A target is told of all that a forward sees, the draft included; a drafter is told of the
        committed tokens, and adds what it feeds behind them.
        """

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """Allocate exactly this, with `join` for the running batch and else for the next one.

        Without `join` the cache of the batch before is freed at once.
        """

    def wipe(self, rows: Sequence[int]) -> None:
        """Zero rows that may hold NaN."""


@runtime_checkable
class CatchesUp(Protocol):
    """A drafter that reads a prompt only when it is asked for a draft, or before by this."""

    def catch_up(self) -> None:
        """Read all prompts now: called where every row will be drafted for."""


@runtime_checkable
class PrefillsInParts(Protocol):
    """A target that can cache a long prompt in parts, with steps of the running rows in between."""

    def prefill_ahead(self, prompts: Prompts, taps: Sequence[int], num_tokens: int) -> bool:
        """Cache the next part of prompts that will join; their `prefill` goes on from there.

        A part holds `num_tokens`, padding included. Where no more than that is left to do it does
        nothing and returns False. Other prompts, or none, replace those begun before.
        """


# Holders of the targets and drafters that decode now. By identity, because one of the user's own
# need not be hashable. A holder keeps its ids valid, and leaves by itself where it is dropped.
_HOLDERS: WeakValueDictionary[int, object] = WeakValueDictionary()
_HOLDING = Lock()


def claim(owners: Sequence[object], holder: object) -> None:
    """Reserve targets and drafters for one loop, or raise RuntimeError and reserve none."""
    with _HOLDING:
        for owner in owners:
            if _HOLDERS.get(id(owner), holder) is not holder:
                name = type(owner).__name__
                raise RuntimeError(
                    f"this {name} is in use by another loop; let that end, drop it, or load another"
                )
        _HOLDERS.update((id(owner), holder) for owner in owners)


def release(owners: Sequence[object], holder: object) -> None:
    """Give up what this holder has claimed."""
    with _HOLDING:
        for owner in owners:
            if _HOLDERS.get(id(owner)) is holder:
                del _HOLDERS[id(owner)]


@contextmanager
def claimed(*owners: object) -> Iterator[None]:
    """Reserve targets and drafters for a call that writes over their caches."""
    holder = Lock()
    claim(owners, holder)
    try:
        yield
    finally:
        release(owners, holder)


def cache_owners(*owners: object) -> list[object]:
    """List targets and drafters with those inside them: merged ones, and a draft model's own."""
    found = [owner for owner in owners if owner is not None]
    for owner in found:  # grows on the way
        found += getattr(owner, "drafters", ())
        found += [m for m in [getattr(owner, "model", None)] if isinstance(m, Target)]
    return found
