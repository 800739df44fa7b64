"""Any transformers causal LM as target or draft model, its modeling file untouched."""

import inspect
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.engine.clock import ForwardClock
from specdec.engine.interfaces import Capabilities, Prompts, TargetOutput
from specdec.engine.kv_cache import SlotCache
from specdec.targets.masks import Masks
from specdec.targets.probe import check_target
from specdec.targets.taps import TapReader
from specdec.verify import Draft, Verdict
from specdec.verify.tree import ancestor_mask, node_depths

# Long prompts are cached in chunks, which bounds the memory of masks and activations.
PREFILL_CHUNK = 1024
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class HFTarget:
    """A transformers causal LM with a `SlotCache`.

    Args:
        model: in eval mode, on its device.
        tokenizer: its tokenizer, or None for token ids only.

    Raises:
        ValueError: an encoder-decoder, or layers with a recurrent state, which a rejected token
            would have changed for good.
    """

    capabilities = Capabilities()

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        head = getattr(model, "get_output_embeddings", None)
        if isinstance(model, type) or head is None or head() is None:
            raise TypeError(
                f"model is a {type(model).__name__} but must be a transformers causal LM"
            )
        self.config = model.config.get_text_config()
        _refuse_what_cannot_roll_back(model, self.config)
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.clock = ForwardClock(self.device)
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.max_context_len = max_context_len(self.config)
        self.eos_token_ids = eos_token_ids(model)
        self._masks = Masks(self.config, self.device, _added_mask_dtype(model))
        self._taps = TapReader(model, self.config.num_hidden_layers)
        self.cache = SlotCache(self.config.num_hidden_layers, 1, 1, self.device)
        arguments = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"  # older versions
        self._scored_tree = False
        self._cache_plan: list[Hashable] | None = None
        self._reserved: int | None = None  # slots of the next prefill's rows
        check_target(self)
        self.clock.take()
        self.cache = SlotCache(self.config.num_hidden_layers, 1, 1, self.device)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, per row."""
        return self.cache.lengths

    def prefill(
        self, prompts: Prompts, taps: Sequence[int] = (), *, join: bool = False
    ) -> TargetOutput:
        """Cache every prompt whole; logits [B, 1, V] of each prompt's last token.

        A prompt may be empty (a draft model has nothing to cache before the root); its logits then
        mean nothing. With `join` the prompts become the last rows of the running batch.
        """
        running = self.cache if join else None  # or else it must not stay beside the new one
        output = self._start(prompts, taps)
        if running:
            running.append(self.cache)
            self.cache = running
        return output

    def _start(self, prompts: Prompts, taps: Sequence[int]) -> TargetOutput:
        """Cache the prompts as a batch of their own."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        capacity = max(2 * longest, 128) if self._reserved is None else self._reserved
        self.cache, self._reserved = self._new_cache(len(prompts), max(longest, capacity)), None
        if longest == 0:
            return TargetOutput(torch.zeros(len(prompts), 1, self.vocab_size, device=self.device))
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(rows, device=self.device)
        chunks = []
        logits: Tensor | None = None
        for start in range(0, longest, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, longest)
            last = sorted({n - 1 - start for n in lengths if start < n <= end})
            out = self._forward_chunk(tokens[:, start:end], last, taps)
            chunks.append(out.hidden)
            if logits is None:
                logits = out.logits.new_zeros(len(prompts), 1, out.logits.shape[-1])
            for row, length in enumerate(lengths):
                if start < length <= end:
                    logits[row, 0] = out.logits[row, last.index(length - 1 - start)]
        self.cache.rollback(lengths)
        assert logits is not None
        return TargetOutput(logits, {t: torch.cat([c[t] for c in chunks], 1) for t in taps})

    def _new_cache(self, batch_size: int, capacity: int) -> SlotCache:
        num_layers = self.config.num_hidden_layers
        return SlotCache(num_layers, batch_size, capacity, self.device, self._plan_cache())

    def _plan_cache(self) -> list[Hashable]:
        if self._cache_plan is None:
            # One token tells what no config does: each layer's heads, their size and their device.
            running = self.cache
            self.cache = SlotCache(self.config.num_hidden_layers, 1, 1, self.device)
            self._forward_chunk(torch.zeros(1, 1, dtype=torch.long, device=self.device), [0], ())
            self._cache_plan, self._slot_bytes = self.cache.plan, self.cache.num_bytes
            self.cache = running
            self.clock.take()
        return self._cache_plan

    @property
    def cache_bytes(self) -> int:
        """See `HoldsCache`."""
        return self.cache.num_bytes

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """See `HoldsCache`."""
        self._plan_cache()
        return num_rows * num_slots * self._slot_bytes

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """See `HoldsCache`."""
        # What joins is cached apart at first, as tightly as it can be.
        self._reserved = 0 if join else num_slots
        if join:
            self.cache.resize(num_rows, num_slots)
        else:
            self.cache = SlotCache(self.config.num_hidden_layers, 1, 1, self.device)

    def wipe(self, rows: Sequence[int]) -> None:
        """See `HoldsCache`."""
        self.cache.wipe(rows)

    def _forward_chunk(
        self, tokens: Tensor, wanted: list[int], taps: Sequence[int]
    ) -> TargetOutput:
        """Cache a chunk of columns; every row, padding included, is written for now."""
        batch, width = tokens.shape
        start = self.cache.lengths[0]
        end = self.cache.open(width)
        positions = torch.arange(start, end, device=self.device).expand(batch, -1)
        keep = torch.tensor(wanted or [0], device=self.device)
        out = self._forward(tokens, positions, self._masks.chain(self.cache, width), taps, keep)
        self.cache.extend([width] * batch)
        return out

    def score(self, root: Tensor, draft: Draft, taps: Sequence[int] = ()) -> TargetOutput:
        """One forward over root [B] and nodes [B, N]; logits [B, N + 1, V]. Commits nothing."""
        num_new = draft.num_nodes + 1
        tokens = root.unsqueeze(1)
        if draft.num_nodes:
            tokens = torch.cat([tokens, draft.tokens.clamp(min=0)], 1)
        self.cache.open(num_new)
        self._scored_tree = draft.parents is not None
        if draft.parents is None:
            positions = self._next_positions(num_new)
            mask = self._masks.chain(self.cache, num_new)
        else:
            depths = _with_root(node_depths(draft.parents, draft.depth))
            positions = self._positions(self.cache.device_lengths.unsqueeze(1) + depths)
            own = _root_and_ancestors(ancestor_mask(draft.parents, draft.depth))
            mask = self._masks.tree(self.cache, own, depths)
        return self._forward(tokens, positions, mask, taps, 0)

    def feed(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Commit `counts[b]` of the tokens [B, n] to every row; logits [B, V] after the last.

        A row with count 0 commits nothing, and its logits mean nothing.
        """
        width = tokens.shape[1]
        self.cache.open(width)
        mask = self._masks.chain(self.cache, width)
        logits = self._forward(tokens, self._next_positions(width), mask, (), 0).logits
        self.cache.extend(counts)
        if width == 1:
            return logits[:, 0]
        last = torch.tensor([max(count - 1, 0) for count in counts], device=self.device)
        return logits[torch.arange(len(counts), device=self.device), last]

    def grow(self, tokens: Tensor, visible: Tensor, depths: Tensor) -> Tensor:
        """Feed the newest level of a tree that grows behind the committed tokens; logits [B, n, V].

        Commits nothing: the next `feed` or `score` writes over the tree.

        Args:
            tokens: [B, n] int64.
            visible: [B, n, S] bool, which of the S nodes fed so far each one sees; the last n of
                them are the new ones.
            depths: [S] int64, levels of these nodes, 0 for the first.
        """
        batch, num_new, num_open = visible.shape
        self.cache.open(num_new, behind=num_open - num_new)
        newest = depths[num_open - num_new :]
        positions = self._positions(self.cache.device_lengths.unsqueeze(1) + newest)
        mask = self._masks.tree(self.cache, visible, depths.expand(batch, -1))
        return self._forward(tokens, positions, mask, (), 0).logits

    def commit(self, verdict: Verdict, num_accepted: Sequence[int]) -> None:
        """Keep the root and the accepted path: a chain only moves lengths, a tree gathers."""
        if self._scored_tree and any(num_accepted):
            self.cache.gather_path(verdict.path)
        self.cache.extend([count + 1 for count in num_accepted])

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.reorder(rows)

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget the cached tokens behind `lengths[b]`."""
        self.cache.rollback(lengths)

    def _next_positions(self, num_new: int) -> Tensor:
        """Positions [B, num_new] behind every row's committed tokens."""
        lengths = self.cache.lengths
        offsets = torch.arange(num_new, device=self.device)
        if self.cache.is_uniform:
            return self._positions(lengths[0] + offsets).expand(len(lengths), -1)
        return self._positions(self.cache.device_lengths.unsqueeze(1) + offsets)

    def _positions(self, places: Tensor) -> Tensor:
        """Padding of a row that is nearly full must not look past the model's position table."""
        return places.clamp(max=self.max_context_len - 1)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Any,
        taps: Sequence[int],
        logits_to_keep: int | Tensor,
    ) -> TargetOutput:
        def forward(output_hidden_states: bool) -> Any:
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                output_hidden_states=output_hidden_states,
                **{self._cache_name: self.cache},
            )

        with torch.no_grad(), self.clock.forward():
            out, hidden = self._taps.run(forward, taps)
        return TargetOutput(out.logits, hidden)


def _with_root(depths: Tensor) -> Tensor:
    """Depths [B, N] of nodes to depths [B, N + 1] of root and nodes."""
    return torch.nn.functional.pad(depths, (1, 0))


def _root_and_ancestors(mask: Tensor) -> Tensor:
    """Node mask [B, N, N] to [B, N + 1, N + 1]: everyone sees the root, the root only itself."""
    padded = torch.nn.functional.pad(mask, (1, 0, 1, 0))
    padded[:, :, 0] = True
    return padded


def _added_mask_dtype(model: Any) -> torch.dtype | None:
    """Dtype of the masks: "eager" attention adds them to its scores."""
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return model.get_input_embeddings().weight.dtype if attention == "eager" else None


def max_context_len(config: Any) -> int:
    """Positions that a text config allows; with LongRoPE its original length, with a warning.

    Behind that length all frequencies are others, also those that cached keys were turned by, and a
    draft that reaches over the edge would change its own root.

    Raises:
        ValueError: the config names no length.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    stated = max(int(getattr(config, name, None) or 0) for name in names)
    if stated <= 0:
        raise ValueError(
            f"{type(config).__name__} names no context length ({', '.join(names)}); a target must "
            "look at positions, and know how many there are"
        )
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = getattr(config, "original_max_position_embeddings", None) or stated
    safe = stated
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
            safe = min(safe, rope.get("original_max_position_embeddings") or original)
    if safe < stated:
        warnings.warn(
            f"{type(config).__name__} has LongRoPE, whose frequencies change behind {safe} tokens: "
            f"its context is {safe} tokens here and not {stated}",
            stacklevel=2,
        )
    return min(safe, torch.iinfo(torch.int64).max)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Ids that end an answer, as the model's generation config or its config says."""
    settings = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(type(each) is int for each in ids):
        raise ValueError(
            f"{type(model).__name__} has eos_token_id {eos!r} but must have token ids or None"
        )
    return ids


def _refuse_what_cannot_roll_back(model: Any, config: Any) -> None:
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; a target must be a causal language model")
    layers = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(layers - _KNOWN_LAYERS)
    if unknown or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} has layers that cannot be rolled back ({', '.join(unknown) or 'recurrent'}): "
            "a rejected draft token would stay in their state; use a model with attention only"
        )
