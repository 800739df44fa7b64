"""Any transformers causal LM as target or draft model, its modeling file untouched."""

import inspect
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.compile import CannotCompileError, compile_mode, compile_s
from specdec.engine.interfaces import KEYS_VALUES, Capabilities, Prompts, TargetOutput
from specdec.engine.kv_cache import SlotCache
from specdec.engine.metrics import ForwardClock
from specdec.engine.quantize import mode_of
from specdec.targets.attention import Masks
from specdec.targets.compiled import CompiledLM, Forward, GraphedLM, States
from specdec.targets.probe import check_target
from specdec.targets.recurrent import HybridCache, Nodes, mixers, unknown_mixers, use_states
from specdec.targets.taps import TapReader
from specdec.verify import Draft, Verdict

# Long prompts are cached in chunks, which bounds the memory of masks and activations.
PREFILL_CHUNK = 1024
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "moe", "mlp", "attention"}


@dataclass(eq=False)
class _Reading:
    """Prompts on their way into a cache of their own; the first `num_read` columns are there."""

    prompts: list[list[int]]
    taps: tuple[int, ...]
    cache: SlotCache
    logits: Tensor
    num_read: int = 0
    hidden: list[dict[int, Tensor]] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return max(map(len, self.prompts), default=0) - self.num_read


class TargetEnds:
    """A causal LM that is never run; weights other than its two ends' may be on the meta device."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config.get_text_config()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.max_context_len = max_context_len(self.config)
        self.eos_token_ids = eos_token_ids(model)


class HFTarget(TargetEnds):
    """A transformers causal LM with a `SlotCache`.

    Args:
        model: the causal LM, in eval mode, on its device.
        tokenizer: its tokenizer, or None for token ids only.
        compile: as in `load_target`.
        cache: as in `load_target`.

    Attributes:
        compile_mode: "eager", "inductor" or "graphs".
        is_hybrid: it has recurrent layers.
        compile_s: seconds of compiling it, or of loading what was compiled before.

    Raises:
        TypeError: something other than a causal LM.
        ValueError: an encoder-decoder, or recurrent layers other than gated delta rules, Mamba-2
            and short convolutions, whose state a rejected token would change for good; a mode that
            the device does not have; a quantized cache of a model that caches no keys and values,
            or heads that cannot be packed.
        RuntimeError: it cannot be compiled, and `compile` asks for it.
    """

    capabilities = Capabilities(first_tap=KEYS_VALUES)

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        compile: bool | str = False,
        cache: str | None = None,
    ) -> None:
        head = getattr(model, "get_output_embeddings", None)
        if isinstance(model, type) or head is None or head() is None:
            raise TypeError(
                f"model is a {type(model).__name__} but must be a transformers causal LM"
            )
        wanted = mode_of(cache)
        self.is_hybrid = _has_states(model, model.config.get_text_config())
        super().__init__(model, tokenizer)
        self.clock = ForwardClock(self.device)
        # "eager" attention adds its mask to the scores, so it needs the dtype of the activations.
        is_eager = getattr(self.config, "_attn_implementation", None) == "eager"
        mask_dtype = model.get_input_embeddings().weight.dtype if is_eager else None
        self._masks = Masks(self.config, self.device, mask_dtype)
        self._taps = TapReader(model, self.config.num_hidden_layers)
        arguments = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"  # older versions
        self._scored_tree = False
        self._reserved: int | None = None  # slots of the next prefill's rows
        self._is_bounded = False  # the room of the running rows is given by `reserve`
        self._ahead: _Reading | None = None
        self._places = torch.empty(1, 0, dtype=torch.long, device=self.device)
        self._cache_mode: str | None = None
        self.cache = self._empty_cache()
        if self.is_hybrid:
            self._masks.may_be_none = False  # or mixers would ask the cache for their own
            use_states(model)
        self._compiled: CompiledLM | None = None
        self._graphed: GraphedLM | None = None
        self.compile_mode, before = "eager", compile_s()
        check_target(self)
        if (mode := compile_mode(compile, self.device, wanted)) != "eager":
            self._compile(mode)
            check_target(self)  # the compiled code
        self.compile_s = compile_s() - before
        if wanted:  # what was checked is the model, not how much is lost now
            self._quantize(wanted)
        self.clock.take()
        self.cache = self._empty_cache()

    def _compile(self, mode: str) -> None:
        if self.is_hybrid:
            name = type(self.model).__name__
            raise CannotCompileError(
                f"{name} cannot be compiled: it has recurrent layers; load it with compile=False"
            )
        self._masks.may_be_none = False
        self.compile_mode = mode
        if mode == "graphs":
            self._graphed = GraphedLM(self.model, self._taps, self._arguments, self.device)
            return
        try:
            if not self._taps.layers:
                raise CannotCompileError("its layers cannot be told from other modules")
            with torch.no_grad():
                self._compiled = CompiledLM(
                    self.model, self._taps.layers, self._arguments, self._examples()
                )
        except CannotCompileError as error:
            name = type(self.model).__name__
            raise CannotCompileError(
                f"{name} cannot be compiled: {error}; load it with compile=False"
            ) from error

    def _quantize(self, mode: str) -> None:
        self._cache_mode = mode
        self.__dict__.pop("_layout", None)
        if not self._layout[1]:
            raise ValueError(
                f"cache is {mode!r}, but {type(self.model).__name__} caches no keys and values to "
                "quantize; leave it out"
            )

    def _examples(self) -> Iterator[tuple[Forward, States]]:
        """Open two caches for forwards whose sizes all differ."""
        for lengths, width, num_slots in (((5, 3), 4, 16), ((9, 7, 2), 6, 32)):
            self._reserved = num_slots
            self.prefill([[0] * length for length in lengths])
            tokens = torch.zeros(len(lengths), width, dtype=torch.long, device=self.device)
            self.cache.open(width)
            mask = self._masks.chain(self.cache, width)
            places = self.cache.new_slots
            assert self.cache.states is not None
            yield Forward(tokens, self._clamp(places), mask, places), self.cache.states

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths

    def prefill(
        self, prompts: Prompts, taps: Sequence[int] = (), *, join: bool = False
    ) -> TargetOutput:
        """Cache every prompt whole; logits [B, 1, V] of each prompt's last token.

        A prompt may be empty (a draft model has nothing to cache before the root); its logits then
        mean nothing. With `join` the prompts become the last rows of the running batch.
        """
        running = self.cache if join else None  # or else it must not stay beside the new one
        longest = max(map(len, prompts))
        reading, self._ahead = self._begun(prompts, taps), None
        if not join:
            self._is_bounded = self._reserved is not None
            default = max(2 * longest, 128)
            capacity = default if self._reserved is None else max(longest, self._reserved)
            if self.compile_mode == "graphs" and self.cache.num_bytes and not reading.num_read:
                self.cache.restart(len(prompts), capacity)  # captured graphs point there
                reading.cache = self.cache
            else:
                reading.cache.resize(len(prompts), capacity)
        self.cache = reading.cache  # what joins is cached apart at first, as tightly as it can be
        self._reserved = None
        while reading.num_left:
            self._read(reading, PREFILL_CHUNK)
        self.cache.rollback([len(prompt) for prompt in prompts])
        if running:
            running.append(self.cache)
            self.cache = running
        taps = taps if reading.hidden else ()
        hidden = {tap: torch.cat([part[tap] for part in reading.hidden], 1) for tap in taps}
        return TargetOutput(reading.logits, hidden)

    def prefill_ahead(self, prompts: Prompts, taps: Sequence[int], num_tokens: int) -> bool:
        """Cache the next part of prompts that will join, beside the running batch."""
        if not prompts:
            self._ahead = None
            return False
        reading, self._ahead = self._begun(prompts, taps), None  # forgotten where this fails
        is_long = reading.num_left * len(prompts) > num_tokens
        num_rows, longest = len(self.lengths) + len(prompts), max(map(len, prompts))
        room = longest + longest // 4  # and some for the answer
        # Making room may take as long as a part, and comes instead of one.
        if is_long and (self._is_bounded or not self.cache.make_room(num_rows, room)):
            running, self.cache = self.cache, reading.cache
            self._read(reading, max(1, num_tokens // len(prompts)))
            self.cache = running
        self._ahead = reading
        return is_long

    def _begun(self, prompts: Prompts, taps: Sequence[int]) -> _Reading:
        """Return what has been read ahead of these prompts, or a new beginning."""
        given, begun = [list(prompt) for prompt in prompts], self._ahead
        if begun is not None and (begun.prompts, begun.taps) == (given, tuple(taps)):
            return begun
        self._ahead = None  # its memory is free before there is more
        longest, num_layers = max(map(len, given)), self.config.num_hidden_layers
        kind, how = type(self.cache), (self._layout[0], self._cache_mode)
        cache = kind(num_layers, len(given), longest, self.device, *how)
        logits = torch.zeros(len(given), 1, self.vocab_size, device=self.device)
        return _Reading(given, tuple(taps), cache, logits)

    def _read(self, reading: _Reading, num_columns: int) -> None:
        """Feed the next columns of prompts; every row, padding included, is written for now."""
        start = reading.num_read
        end = start + min(num_columns, reading.num_left)
        lengths = [len(prompt) for prompt in reading.prompts]
        rows = [[*row[start:end], *[0] * (end - max(start, len(row)))] for row in reading.prompts]
        tokens = torch.tensor(rows, dtype=torch.long, device=self.device)
        ending = [row for row, length in enumerate(lengths) if start < length <= end]
        wanted = sorted({lengths[row] - 1 - start for row in ending}) or [0]
        counts = [min(max(length - start, 0), end - start) for length in lengths]
        self._run_over(counts=counts)
        out = self._forward_chain(tokens, reading.taps, torch.tensor(wanted, device=self.device))
        self.cache.extend([end - start] * len(rows))
        reading.num_read = end
        reading.hidden.append(out.hidden)
        if start == 0:
            reading.logits = torch.zeros_like(out.logits[:, :1])
        for row in ending:
            reading.logits[row, 0] = out.logits[row, wanted.index(lengths[row] - 1 - start)]

    def _empty_cache(self) -> SlotCache:
        kind = HybridCache if self.is_hybrid else SlotCache
        return kind(self.config.num_hidden_layers, 1, 1, self.device, None, self._cache_mode)

    def _run_over(self, draft: Draft | None = None, counts: Sequence[int] | None = None) -> None:
        """Tell recurrent layers what the next forward runs over."""
        if not isinstance(self.cache, HybridCache):
            return
        known = None if counts is None else torch.tensor(counts, device=self.device)
        if draft is None or draft.parents is None:
            self.cache.run_over(Nodes(counts=known))
            return
        parents = pad(draft.parents + 1, (1, 0), value=-1)
        self.cache.run_over(Nodes(_seen(draft), parents))

    @cached_property
    def _layout(self) -> tuple[list[Hashable], int, int]:
        """Plan of the cache, bytes of a slot and of a row: one token tells what no config does."""
        running, self.cache = self.cache, self._empty_cache()
        self._forward_chain(torch.zeros(1, 1, dtype=torch.long, device=self.device), ())
        layout = self.cache.plan, self.cache.slot_bytes, self.cache.row_bytes
        self.cache = running
        self.clock.take()
        return layout

    @property
    def cache_bytes(self) -> int:
        return self.cache.num_bytes + (self._ahead.cache.num_bytes if self._ahead else 0)

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        _, of_slot, of_row = self._layout
        return num_rows * (num_slots * of_slot + of_row)

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        if join:
            self.cache.resize(num_rows, num_slots)
            return
        self._reserved = num_slots
        if self.compile_mode != "graphs":  # which keep the storage that they point to
            self.cache = self._empty_cache()

    def wipe(self, rows: Sequence[int]) -> None:
        self.cache.wipe(rows)

    def score(self, root: Tensor, draft: Draft, taps: Sequence[int] = ()) -> TargetOutput:
        """Run one forward over root [B] and nodes [B, N]; logits [B, N + 1, V]. Commits nothing."""
        tokens = root.unsqueeze(1)
        if draft.num_nodes:
            tokens = torch.cat([tokens, draft.tokens.clamp(min=0)], 1)
        self._scored_tree = draft.parents is not None
        self._run_over(draft)
        if draft.parents is None:
            return self._forward_chain(tokens, taps)
        self.cache.open(draft.num_nodes + 1)
        return self._forward_tree(tokens, _seen(draft), pad(draft.depths, (1, 0)), taps)

    def feed(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Commit `counts[b]` of the tokens [B, n] to every row; logits [B, V] after the last.

        A row with count 0 commits nothing, and its logits mean nothing.
        """
        self._run_over(counts=counts)
        logits = self._forward_chain(tokens, ()).logits
        self.cache.extend(counts)
        last = [max(count - 1, 0) for count in counts]
        if len(set(last)) == 1:
            return logits.select(1, last[0])
        rows = torch.arange(len(counts), device=self.device)
        return logits[rows, torch.tensor(last, device=self.device)]

    def grow(self, tokens: Tensor, visible: Tensor, depths: Tensor) -> Tensor:
        """Feed the newest level [B, n] of a tree that grows uncommitted; logits [B, n, V].

        `visible` [B, n, S] says which of the S nodes fed so far, the new ones last, each new one
        sees; `depths` [S] are the levels of these nodes. The next `feed` or `score` writes over it.
        """
        batch, num_new, num_open = visible.shape
        self.cache.open(num_new, behind=num_open - num_new)
        return self._forward_tree(tokens, visible, depths.expand(batch, -1), ()).logits

    def commit(self, verdict: Verdict, num_accepted: Sequence[int]) -> None:
        """Keep the root and the accepted path: a chain only moves lengths, a tree gathers."""
        if self._scored_tree and any(num_accepted):
            self.cache.gather_path(verdict.path)
        self.cache.extend([count + 1 for count in num_accepted])

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder(rows)

    def rollback(self, lengths: Sequence[int]) -> None:
        self.cache.rollback(lengths)

    def _forward_chain(
        self, tokens: Tensor, taps: Sequence[int], keep: int | Tensor = 0
    ) -> TargetOutput:
        """Feed tokens [B, n] behind every row's committed ones."""
        cache = self.cache
        batch, width = tokens.shape
        end = cache.open(width)
        mask = self._masks.chain(cache, width)
        if cache.is_uniform:
            if end > self._places.shape[1]:
                places = torch.arange(cache.capacity, device=self.device)
                self._places = self._clamp(places.unsqueeze(0))
            positions = self._places[:, end - width : end]
            positions = positions if batch == 1 else positions.expand(batch, -1)
        else:
            places = torch.arange(width, device=self.device)
            positions = self._clamp(cache.device_lengths.unsqueeze(1) + places)
        return self._forward(tokens, positions, mask, taps, keep)

    def _forward_tree(
        self, tokens: Tensor, visible: Tensor, depths: Tensor, taps: Sequence[int]
    ) -> TargetOutput:
        """Feed the last n of S uncommitted nodes of a tree, whose `depths` are [B, S]."""
        own = depths[:, depths.shape[1] - tokens.shape[1] :]
        positions = self._clamp(self.cache.device_lengths.unsqueeze(1) + own)
        mask = self._masks.tree(self.cache, visible, depths)
        return self._forward(tokens, positions, mask, taps, 0)

    def _clamp(self, places: Tensor) -> Tensor:
        """Keep padding of a row that is nearly full inside the model's position table."""
        return places.clamp(max=self.max_context_len - 1)

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Any, taps: Sequence[int], keep: int | Tensor
    ) -> TargetOutput:
        states = tuple(tap for tap in taps if tap != KEYS_VALUES)
        output = self._run(tokens, positions, mask, states, keep)
        if KEYS_VALUES in taps:
            output.hidden[KEYS_VALUES] = self.cache.newest(tokens.shape[1])
        return output

    def _run(
        self, tokens: Tensor, positions: Tensor, mask: Any, taps: Sequence[int], keep: int | Tensor
    ) -> TargetOutput:
        is_step = isinstance(keep, int)  # and no prefill, which is mostly arithmetic

        def run(output_hidden_states: bool) -> Any:
            return self.model(
                **self._arguments(Forward(tokens, positions, mask), self.cache),
                logits_to_keep=keep,
                output_hidden_states=output_hidden_states,
            )

        with torch.no_grad(), self.clock.forward():
            if self.compile_mode != "eager" and is_step and (states := self.cache.states):
                forward = Forward(tokens, positions, mask, self.cache.new_slots)
                if self._graphed and (found := self._graphed(forward, self.cache, taps)):
                    return TargetOutput(*found)
                if self._compiled:
                    logits, hidden_states = self._compiled(forward, states)
                    return TargetOutput(logits, {tap: hidden_states[tap] for tap in taps})
            out, hidden = self._taps.run(run, taps)
        return TargetOutput(out.logits, hidden)

    def _arguments(self, forward: Forward, cache: Any) -> dict[str, Any]:
        return {
            "input_ids": forward.tokens,
            "attention_mask": forward.mask,
            "position_ids": forward.positions,
            "use_cache": True,
            self.cache_name: self.cache if cache is None else cache,
        }


def max_context_len(config: Any) -> int:
    """Return the positions that a text config allows; with LongRoPE its original length.

    Behind that length all frequencies are others, also those that cached keys were turned by, and a
    draft that reaches over the edge would change its own root. A warning says so.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    stated = max(int(getattr(config, name, None) or 0) for name in names)
    if stated <= 0:
        kind = type(config).__name__
        raise ValueError(f"{kind} names no context length ({', '.join(names)}); give it one")
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = getattr(config, "original_max_position_embeddings", None) or stated
    safe = stated
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
            safe = min(safe, rope.get("original_max_position_embeddings") or original)
    if safe < stated:
        change = f"its context is {safe} tokens here and not {stated}"
        warnings.warn(f"LongRoPE changes its frequencies: {change}", stacklevel=2)
    return min(safe, torch.iinfo(torch.int64).max)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Return the ids that end an answer, by the model's generation config or its config."""
    settings = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(type(each) is int for each in ids):
        raise ValueError(
            f"eos_token_id {eos!r} of {type(model).__name__} must be token ids or None"
        )
    return ids


def _seen(draft: Draft) -> Tensor:
    """Root and nodes [B, N + 1, N + 1] that each sees: everyone the root, the root only itself."""
    batch, num_nodes = draft.tokens.shape
    size = num_nodes + 1
    visible = torch.zeros(batch, size, size, dtype=torch.bool, device=draft.tokens.device)
    visible[:, 1:].scatter_(2, draft.ancestors + 1, True)
    visible[:, :, 0] = True
    return visible


def _has_states(model: Any, config: Any) -> bool:
    """Tell if a model has recurrent layers; refuse those that cannot be run here."""
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; a target must be a causal language model")
    found = [*mixers(model)]
    known = _KNOWN_LAYERS | (_RECURRENT_LAYERS if found else set())
    unknown = {*(getattr(config, "layer_types", None) or ())} - known
    unknown |= {*unknown_mixers(model)}
    if unknown or (getattr(model, "_is_stateful", False) and not found):
        raise ValueError(
            f"{name} has layers that cannot be rolled back after a rejection "
            f"({', '.join(sorted(unknown)) or 'recurrent'}); use a model with attention, gated "
            "delta rules or Mamba-2"
        )
    return bool(found)
