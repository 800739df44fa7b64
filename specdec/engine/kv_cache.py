"""A preallocated, batched KV cache whose rows have lengths of their own.

Row b's next token goes to slot `lengths[b]`. A forward writes its new tokens behind every row's
committed ones; what is not accepted is simply written over by the next forward. Nothing is padded
again and nothing but an accepted tree path is ever moved.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Slots:
    """The slots that the next forward writes, shared by all layers."""

    num_rows: int
    capacity: int
    start: int = 0  # of every row, where all are equal
    end: int = 0  # one past the last slot that any row uses
    index: Tensor | None = None  # [B, n] slots of ragged rows


class _Bank:
    """Storage of layers of equal shape, [layers, rows, kv heads, capacity, head_dim].

    Layers that share one are moved, grown and reordered by one operation.
    """

    def __init__(self, slots: _Slots) -> None:
        self._slots = slots
        self.layers: list[_SlotLayer] = []
        self.states: dict[str, Tensor] = {}  # keys and values, once their shape is known

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make room, for states [..., heads, any length, head_dim] like these."""
        for name, like in (("keys", keys), ("values", values)):
            self._put(name, _allocate(like, len(self.layers), self._slots))

    def _put(self, name: str, states: Tensor) -> None:
        self.states[name] = states
        for layer, own in zip(self.layers, states, strict=True):
            setattr(layer, name, own)
            layer.is_initialized = True

    def resize(self, num_rows: int) -> None:
        """Allocate this many rows of the slots there are now; only one part stands twice."""
        slots = _Slots(num_rows, self._slots.capacity)
        for name, states in list(self.states.items()):
            changed = _allocate(states, len(self.layers), slots)
            rows, width = min(num_rows, states.shape[1]), min(slots.capacity, states.shape[3])
            changed[:, :rows, :, :width] = states[:, :rows, :, :width]
            self._put(name, changed)
            del states, changed

    def grow(self) -> None:
        """Make room for the rows and slots there are now."""
        if self.states:
            self.resize(max(self.states["keys"].shape[1], self._slots.num_rows))

    def move(self, sources: Tensor, first: Tensor, start: int) -> None:
        """Copy slots [B, D] to the D slots from `first` [B] on in every layer, reading first.

        A single row is copied to the slots from `start` on, which is cheaper.
        """
        batch, count = sources.shape
        for states in self.states.values():
            where = sources.to(states.device)
            if batch == 1:
                row = states[:, 0]
                row[:, :, start : start + count] = row.index_select(2, where[0])
                continue
            slots = states.transpose(2, 3)  # [layers, rows, capacity, heads, head_dim]
            rows = torch.arange(batch, device=states.device).unsqueeze(1)
            steps = torch.arange(count, device=states.device)
            slots[:, rows, first.to(states.device).unsqueeze(1) + steps] = slots[:, rows, where]

    def append(self, other: "_Bank", first: int, num_slots: int) -> None:
        """Put another cache's rows at `first` and after; rows without a token hold no keys yet."""
        if not self.states and other.states:
            self.allocate(other.states["keys"][0], other.states["values"][0])
        if self.states and self.states["keys"].shape[1] < self._slots.num_rows:
            self.grow()
        for name, joining in other.states.items():
            rows = slice(first, first + joining.shape[1])
            self.states[name][:, rows, :, :num_slots] = joining[:, :, :, :num_slots]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv heads, capacity, head_dim]; the first B rows live."""

    is_compileable = False
    is_sliding = False

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots, bank: _Bank) -> None:
        super().__init__()
        self._slots, self._bank = slots, bank
        bank.layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._bank.allocate(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write new states to their slots; returns all that attention may see."""
        slots = self._slots
        seen = stored.narrow(0, 0, slots.num_rows).narrow(2, 0, slots.end)
        if slots.index is None:
            seen.narrow(2, slots.start, slots.end - slots.start).copy_(new)
        else:
            index = slots.index.to(seen.device)[:, None, :, None]  # [B, 1, n, 1]
            seen.scatter_(2, index.expand_as(new), new)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.end, 0

    def get_seq_length(self, *args: Any) -> int:
        return self._slots.start  # asked for before the new tokens are written

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The KV cache of a target or a draft model.

    Args:
        num_layers: attention layers of the model.
        batch_size: rows.
        capacity: slots per row to begin with; doubled when they are used up.
        device: device of slot indices.
        plan: `plan` of an earlier cache of the same model: layers of equal shape then share their
            storage, and an accepted path moves by one gather instead of one a layer.

    Attributes:
        lengths: committed tokens in the cache, per row, on the host.
        is_uniform: all rows are equally long, so that slots are slices.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        device: torch.device,
        plan: Sequence[Hashable] | None = None,
    ) -> None:
        self._slots = _Slots(batch_size, capacity)
        kinds = range(num_layers) if plan is None else plan
        banks = {kind: _Bank(self._slots) for kind in kinds}
        self._banks = list(banks.values())
        self._slot_layers = [_SlotLayer(self._slots, banks[kind]) for kind in kinds]
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
    def plan(self) -> list[Hashable]:
        """Shape, dtype and device of every layer, which is all that tells their storage apart.

        Known once a token has been written. A layer that reads another's keys stores nothing.
        """
        return [
            tuple(
                (part.shape[1], part.shape[3], part.dtype, part.device)
                for part in ((layer.keys, layer.values) if layer.is_initialized else ())
            )
            for layer in self._slot_layers
        ]

    def _states(self) -> Iterator[Tensor]:
        for bank in self._banks:
            yield from bank.states.values()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values allocated now."""
        return sum(states.nbytes for states in self._states())

    def open(self, num_new: int, behind: int = 0) -> int:
        """Make room for `num_new` tokens a row, `behind` the committed ones; returns the end slot.

        Slots between them keep what was written there: the levels of a tree before this one.
        """
        slots = self._slots
        slots.start = self.lengths[0] + behind
        slots.end = max(self.lengths) + behind + num_new
        slots.index = None
        if not self.is_uniform:
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
        path = path[:, : self._slots.end - max(self.lengths) - 1]  # no longer than all nodes
        first = self.device_lengths + 1
        steps = torch.arange(path.shape[1], device=path.device)
        # Padding copies a slot onto itself.
        sources = first.unsqueeze(1) + torch.where(path >= 0, path, steps)
        for bank in self._banks:
            bank.move(sources, first, self.lengths[0] + 1)

    def append(self, other: "SlotCache") -> None:
        """Take the rows of another cache behind one's own; no copy of one's own where they fit."""
        first, num_slots = len(self.lengths), max(other.lengths)
        self._slots.num_rows = first + len(other.lengths)
        self._grow(num_slots)
        for bank, joining in zip(self._banks, other._banks, strict=True):
            bank.append(joining, first, num_slots)
        self._set_lengths([*self.lengths, *other.lengths])

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows, in any order; only rows that change their place are copied."""
        kept, end = rows.tolist(), max(self.lengths)
        places = [place for place, row in enumerate(kept) if place != row]
        if places:
            moved = torch.tensor([places, [kept[place] for place in places]], device=self.device)
            for states in self._states():
                live, (to, source) = states[:, :, :, :end], moved.to(states.device)
                live[:, to] = live[:, source]  # all reads before all writes
        self._slots.num_rows = len(kept)
        self._set_lengths([self.lengths[row] for row in kept])

    def resize(self, num_rows: int, num_slots: int) -> None:
        """Allocate exactly this many rows and slots a row; what is committed must fit.

        The next rows and tokens then find their room, and nothing grows before it is used up.
        """
        self._slots.capacity = num_slots
        for bank in self._banks:
            bank.resize(num_rows)

    def wipe(self, rows: Sequence[int]) -> None:
        """Zero these rows: a masked place still takes part in 0 * value, and 0 * NaN is NaN."""
        for states in self._states():
            states[:, list(rows)] = 0

    def _grow(self, num_slots: int) -> None:
        """Double the slots of every row until they suffice."""
        if num_slots > self._slots.capacity:
            while self._slots.capacity < num_slots:
                self._slots.capacity *= 2
            for bank in self._banks:
                bank.grow()

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.is_uniform = len(set(lengths)) <= 1
        self._device_lengths = None


def _allocate(like: Tensor, num_layers: int, slots: _Slots) -> Tensor:
    """Allocate zeros, because a masked slot still takes part in 0 * value, and 0 * NaN is NaN."""
    shape = (num_layers, slots.num_rows, like.shape[-3], slots.capacity, like.shape[-1])
    try:
        return like.new_zeros(shape)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        wanted = math.prod(shape) * like.element_size()
        hint = "lower batch_size or max_new_tokens"
        if like.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(like.device)
            fits = max(0, int(slots.num_rows * free / wanted))
            hint = f"{free:,} bytes are free, enough for these at batch_size {fits}"
        raise MemoryError(
            f"no memory for {wanted:,} bytes of keys or values of {num_layers} layers (batch "
            f"{slots.num_rows}, {slots.capacity} slots a row); {hint}"
        ) from error
