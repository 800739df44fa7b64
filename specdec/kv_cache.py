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

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.start = 0  # of every row, where all are equal
        self.end = 0  # one past the last slot that any row uses
        self.index: Tensor | None = None  # [B, n] slots of ragged rows


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv heads, capacity, head_dim]; the first B rows live."""

    is_compileable = False
    is_sliding = False

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self._slots.num_rows, self._slots.capacity)
        self.keys, self.values = _allocate(key_states, *shape), _allocate(value_states, *shape)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self._slots
        keys = self.keys[: slots.num_rows, :, : slots.end]
        values = self.values[: slots.num_rows, :, : slots.end]
        if slots.index is None:
            keys[:, :, slots.start :] = key_states
            values[:, :, slots.start :] = value_states
        else:
            index = slots.index.to(self.device)[:, None, :, None]  # [B, 1, n, 1]
            keys.scatter_(2, index.expand_as(key_states), key_states)
            values.scatter_(2, index.expand_as(value_states), value_states)
        return keys, values

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def grow(self) -> None:
        """Make room for the rows and slots there are now."""
        num_rows = max(len(self.keys), self._slots.num_rows)
        self.keys = _enlarge(self.keys, num_rows, self._slots.capacity)
        self.values = _enlarge(self.values, num_rows, self._slots.capacity)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy slots [B, D] to slots [B, D], all reads before all writes."""
        for states in (self.keys, self.values):
            _, heads, _, size = states.shape
            shape = (len(sources), heads, sources.shape[1], size)
            moved = states.gather(2, sources.to(states.device)[:, None, :, None].expand(shape))
            index = destinations.to(states.device)[:, None, :, None].expand(shape)
            states.scatter_(2, index, moved)

    def select(self, rows: Tensor, places: Tensor, num_slots: int) -> None:
        """Copy the first slots of `rows` to the rows at `places`, all reads before all writes."""
        for states in (self.keys, self.values):
            live = states[:, :, :num_slots]
            live[places.to(self.device)] = live[rows.to(self.device)]

    def append(self, other: "_SlotLayer", first: int, num_slots: int) -> None:
        """Put another cache's rows at `first` and after; rows without a token hold no keys yet."""
        if not self.is_initialized:
            if not other.is_initialized:
                return
            self.lazy_initialization(other.keys, other.values)
        if len(self.keys) < self._slots.num_rows:
            self.grow()
        if not other.is_initialized:
            return
        for own, joining in ((self.keys, other.keys), (self.values, other.values)):
            own[first : first + len(joining), :, :num_slots] = joining[:, :, :num_slots]

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
        self._slots = _Slots(batch_size, capacity)
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

    @property
    def bytes_per_row(self) -> int:
        """Bytes of keys and values that each row's slots take now."""
        layers = [layer for layer in self._slot_layers if layer.is_initialized]
        return sum(layer.num_bytes // len(layer.keys) for layer in layers)

    def open(self, num_new: int, behind: int = 0) -> int:
        """Make room for `num_new` tokens a row, `behind` the committed ones; returns the end slot.

        Slots between them keep what was written there: the levels of a tree before this one.
        """
        slots = self._slots
        slots.start = self.lengths[0] + behind
        slots.end = max(self.lengths) + behind + num_new
        slots.index = None
        if not self._is_uniform:
            offsets = torch.arange(behind, behind + num_new, device=self.device)
            slots.index = self.device_lengths.unsqueeze(1) + offsets
        self._grow(slots.end)
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
        """Take the rows of another cache behind one's own; no copy of one's own where they fit."""
        first = len(self.lengths)
        self._slots.num_rows = first + len(other.lengths)
        num_slots = max(other.lengths)
        self._grow(num_slots)
        for layer, joining in zip(self._slot_layers, other._slot_layers, strict=True):
            layer.append(joining, first, num_slots)
        self._set_lengths([*self.lengths, *other.lengths])

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows, in any order; only rows that change their place are copied."""
        kept = rows.tolist()
        places = [place for place, row in enumerate(kept) if place != row]
        if places:
            moved = torch.tensor([[kept[place] for place in places], places], device=self.device)
            for layer in self._slot_layers:
                if layer.is_initialized:
                    layer.select(moved[0], moved[1], max(self.lengths))
        self._slots.num_rows = len(kept)
        self._set_lengths([self.lengths[row] for row in kept])

    def _grow(self, num_slots: int) -> None:
        """Double the slots of every row until they suffice."""
        slots = self._slots
        if num_slots <= slots.capacity:
            return
        while slots.capacity < num_slots:
            slots.capacity *= 2
        for layer in self._slot_layers:
            if layer.is_initialized:
                layer.grow()

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._is_uniform = len(set(lengths)) <= 1
        self._device_lengths = None


def _allocate(like: Tensor, num_rows: int, capacity: int) -> Tensor:
    shape = (num_rows, like.shape[1], capacity, like.shape[3])
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


def _enlarge(states: Tensor, num_rows: int, capacity: int) -> Tensor:
    larger = _allocate(states, num_rows, capacity)
    larger[: len(states), :, : states.shape[2]] = states
    return larger
