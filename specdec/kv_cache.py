"""A preallocated, batched KV cache whose rows have lengths of their own.

Row b's next token goes to slot `lengths[b]`. A forward writes its new tokens behind every row's
committed ones; what is not accepted is simply written over by the next forward. Nothing is padded
again and nothing but an accepted tree path is ever moved.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Slots:
    """Where the next forward writes, shared by all layers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0  # of every row, where all are equal
        self.end = 0  # one past the last slot that any row uses
        self.index: Tensor | None = None  # [B, n] slots of ragged rows


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, kv heads, capacity, head_dim]."""

    is_compileable = False
    is_sliding = False

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _allocate(key_states, self._slots.capacity, len(key_states))
        self.values = _allocate(value_states, self._slots.capacity, len(value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self._slots
        if slots.index is None:
            self.keys[:, :, slots.start : slots.end] = key_states
            self.values[:, :, slots.start : slots.end] = value_states
        else:
            index = slots.index.to(self.device)[:, None, :, None]  # [B, 1, n, 1]
            self.keys.scatter_(2, index.expand_as(key_states), key_states)
            self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys[:, :, : slots.end], self.values[:, :, : slots.end]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def grow(self) -> None:
        self.keys = _copy_into(self.keys, self._slots.capacity)
        self.values = _copy_into(self.values, self._slots.capacity)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy slots [B, D] to slots [B, D], all reads before all writes."""
        for states in (self.keys, self.values):
            batch, heads, _, size = states.shape
            shape = (batch, heads, sources.shape[1], size)
            moved = states.gather(2, sources.to(states.device)[:, None, :, None].expand(shape))
            index = destinations.to(states.device)[:, None, :, None].expand(shape)
            states.scatter_(2, index, moved)

    def select(self, rows: Tensor) -> None:
        self.keys = self.keys.index_select(0, rows.to(self.device))
        self.values = self.values.index_select(0, rows.to(self.device))

    def append(self, other: "_SlotLayer", num_rows: int, num_joining: int) -> None:
        """Take the rows of another cache's layer behind one's own; empty rows hold no keys yet."""
        known = self if self.is_initialized else other
        if not known.is_initialized:
            return
        self.dtype, self.device, self.is_initialized = known.dtype, known.device, True
        joined = []
        for name in ("keys", "values"):
            like = getattr(known, name)
            states = _allocate(like, self._slots.capacity, num_rows + num_joining)
            for layer, first in ((self, 0), (other, num_rows)):
                if (own := getattr(layer, name, None)) is not None:
                    states[first : first + own.shape[0], :, : own.shape[2]] = own
            joined.append(states)
        self.keys, self.values = joined

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.end, 0

    def get_seq_length(self, *args: Any) -> int:
        return self._slots.end

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in older transformers."""
        return -1


class SlotCache(Cache):
    """The KV cache of a target or a draft model.

    Args:
        num_layers: attention layers of the model.
        batch_size: rows.
        capacity: slots per row to begin with; doubled when they are used up.
        device: where slot indices live.

    Attributes:
        lengths: committed tokens in the cache, per row, on the host.
    """

    def __init__(
        self, num_layers: int, batch_size: int, capacity: int, device: torch.device
    ) -> None:
        self._slots = _Slots(capacity)
        self._slot_layers = [_SlotLayer(self._slots) for _ in range(num_layers)]
        super().__init__(layers=list(self._slot_layers))
        self.device = device
        self._device_lengths: Tensor | None = None
        self._set_lengths([0] * batch_size)

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self._slots.capacity

    @property
    def device_lengths(self) -> Tensor:
        """`lengths` as int64 [B], copied to the device when first asked for."""
        if self._device_lengths is None:
            self._device_lengths = torch.tensor(self.lengths, device=self.device)
        return self._device_lengths

    @property
    def is_uniform(self) -> bool:
        """Whether all rows are equally long, so that slots are slices."""
        return self._is_uniform

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values allocated now."""
        return sum(layer.num_bytes for layer in self._slot_layers)

    def open(self, num_new: int) -> int:
        """Make room for `num_new` tokens a row behind the committed ones; returns the end slot."""
        slots = self._slots
        slots.start, slots.end = self.lengths[0], max(self.lengths) + num_new
        slots.index = None
        if not self._is_uniform:
            offsets = torch.arange(num_new, device=self.device)
            slots.index = self.device_lengths.unsqueeze(1) + offsets
        if slots.end > slots.capacity:
            while slots.end > slots.capacity:
                slots.capacity *= 2
            for layer in self._slot_layers:
                if layer.is_initialized:
                    layer.grow()
        return slots.end

    def extend(self, counts: Sequence[int]) -> None:
        """Commit the first `counts[b]` of the tokens just written."""
        self._set_lengths([n + c for n, c in zip(self.lengths, counts, strict=True)])

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget what lies behind `lengths[b]` tokens."""
        if list(lengths) != self.lengths:
            self._set_lengths(list(lengths))

    def gather_path(self, path: Tensor) -> None:
        """Move an accepted tree path behind the root: node i was written at length + 1 + i.

        Args:
            path: [B, D] int64 node indices, -1 padded.
        """
        first = self.device_lengths.unsqueeze(1) + 1
        steps = torch.arange(path.shape[1], device=path.device)
        # Padding copies a slot onto itself; the clamp keeps it inside short rows' capacity.
        destinations = (first + steps).clamp(max=self.capacity - 1)
        sources = torch.where(path >= 0, first + path, destinations)
        for layer in self._slot_layers:
            layer.move(sources, destinations)

    def append(self, other: "SlotCache") -> None:
        """Take the rows of another cache, which must not be used any more, behind one's own."""
        self._slots.capacity = max(self.capacity, other.capacity)
        counts = (len(self.lengths), len(other.lengths))
        for layer, joining in zip(self._slot_layers, other._slot_layers, strict=True):
            layer.append(joining, *counts)
        self._set_lengths([*self.lengths, *other.lengths])

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for layer in self._slot_layers:
            if layer.is_initialized:
                layer.select(rows)
        self._set_lengths([self.lengths[row] for row in rows.tolist()])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._is_uniform = len(set(lengths)) <= 1
        self._device_lengths = None


def _allocate(like: Tensor, capacity: int, batch_size: int) -> Tensor:
    shape = (batch_size, like.shape[1], capacity, like.shape[3])
    try:
        # Zeros, because a masked slot still takes part in 0 * value, and 0 * NaN is NaN.
        return like.new_zeros(shape)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise MemoryError(_explain(like, shape)) from error
        raise


def _explain(like: Tensor, shape: tuple[int, ...]) -> str:
    wanted = math.prod(shape) * like.element_size()
    message = (
        f"no memory for {wanted:,} bytes of keys or values of one layer (batch {shape[0]}, "
        f"{shape[2]} slots a row)"
    )
    if like.device.type != "cuda":
        return f"{message}; lower batch_size or max_new_tokens"
    free, _ = torch.cuda.mem_get_info(like.device)
    fits = max(0, int(shape[0] * free / wanted))
    return f"{message}; {free:,} bytes are free, enough for this layer at batch_size {fits}"


def _copy_into(states: Tensor, capacity: int) -> Tensor:
    larger = _allocate(states, capacity, len(states))
    larger[:, :, : states.shape[2]] = states
    return larger
