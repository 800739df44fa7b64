"""A preallocated, batched KV cache whose rows have lengths of their own.

Row b's next token goes to slot `lengths[b]`. A forward writes its new tokens behind every row's
committed ones; what is not accepted is simply written over by the next forward. Nothing is padded
again and nothing but an accepted tree path is ever moved.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.engine.quantize import decode, encode


@dataclass
class _Slots:
    """The slots that the next forward writes, shared by all layers."""

    num_rows: int
    capacity: int
    start: int = 0  # of every row, where all are equal
    behind: int = 0  # slots between the committed tokens and the new ones
    end: int = 0  # one past the last slot that any row uses
    index: Tensor | None = None  # [B, n] slots of ragged rows
    views: list[tuple[Tensor, Tensor]] | None = None  # see `SlotCache.states`


class _Bank:
    """Storage of layers of equal shape, moved, grown and reordered by one operation.

    Keys and values are [layers, rows, kv heads, capacity, head_dim] once their shape is known;
    quantized, the codes of each and their scales are.
    """

    def __init__(self) -> None:
        self.layers: list[_SlotLayer] = []
        self.states: dict[str, Tensor] = {}

    @property
    def num_rows(self) -> int:
        return self.states["keys"].shape[1] if self.states else 0

    def put(self, name: str, states: Tensor) -> None:
        self.states[name] = states
        for layer, own in zip(self.layers, states, strict=True):
            setattr(layer, name, own)
            # No longer needed there; and what holds each other is not freed at once.
            layer.is_initialized, layer.bank, layer.slots.views = True, None, None

    def allocate(self, states: Mapping[str, Tensor], num_rows: int, capacity: int) -> None:
        """Make room, for states [..., heads, any length, head_dim] like these."""
        for name, like in states.items():
            self.put(name, _allocate(like, len(self.layers), num_rows, capacity))

    def resize(self, num_rows: int, capacity: int, names: Sequence[str] = ()) -> None:
        """Allocate this many rows and slots anew; only one of the states stands twice."""
        for name in names or self.states:
            old = self.states[name]
            new = _allocate(old, len(self.layers), num_rows, capacity)
            rows, slots = min(num_rows, old.shape[1]), min(capacity, old.shape[3])
            new[:, :rows, :, :slots] = old[:, :rows, :, :slots]
            self.put(name, new)
            del old, new


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv heads, capacity, head_dim]; the first B rows live."""

    is_compileable = False
    is_sliding = False
    names: tuple[str, ...] = ("keys", "values")

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots, bank: _Bank) -> None:
        super().__init__()
        self.slots = slots
        self.bank: _Bank | None = bank
        bank.layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._allocate(key_states, value_states)

    def _allocate(self, *states: Tensor) -> None:
        assert self.bank is not None
        given = dict(zip(self.names, states, strict=True))
        self.bank.allocate(given, self.slots.num_rows, self.slots.capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write new states to their slots; returns all that attention may see."""
        slots = self.slots
        seen = stored.narrow(0, 0, slots.num_rows).narrow(2, 0, slots.end)
        if slots.index is None:
            seen.narrow(2, slots.start, slots.end - slots.start).copy_(new)
        else:
            index = slots.index.to(seen.device)[:, None, :, None]  # [B, 1, n, 1]
            seen.scatter_(2, index.expand_as(new), new)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.end, 0

    def get_seq_length(self, *args: Any) -> int:
        return self.slots.start  # asked for before the new tokens are written

    def get_max_length(self) -> int:
        return -1


class _QuantizedLayer(_SlotLayer):
    """A layer whose keys and values are codes; attention is given what they stand for."""

    names = ("keys", "key_scales", "values", "value_scales")

    key_scales: Tensor
    value_scales: Tensor

    def __init__(self, slots: _Slots, bank: _Bank, mode: str) -> None:
        super().__init__(slots, bank)
        self.mode = mode

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = *encode(key_states, self.mode), *encode(value_states, self.mode)
        if not self.is_initialized:
            self._allocate(*new)
        stored = self.keys, self.key_scales, self.values, self.value_scales
        seen = [self._write(*each) for each in zip(stored, new, strict=True)]
        return decode(seen[0], seen[1], self.mode), decode(seen[2], seen[3], self.mode)


class SlotCache(Cache):
    """The KV cache of a target or a draft model.

    Args:
        num_layers: attention layers of the model.
        batch_size: rows.
        capacity: slots per row to begin with; doubled when they are used up.
        device: device of slot indices.
        plan: `plan` of an earlier cache of the same model: layers of equal shape then share their
            storage, and an accepted path moves by one gather instead of one a layer.
        mode: as in `specdec.engine.quantize`, for keys and values that are quantized when they
            are written, and moved as they are; None for none.

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
        mode: str | None = None,
    ) -> None:
        self._slots = _Slots(batch_size, capacity)
        kinds = range(num_layers) if plan is None else plan
        banks = {kind: _Bank() for kind in kinds}
        self._banks = list(banks.values())
        self.mode = mode
        self._slot_layers = [
            _QuantizedLayer(self._slots, banks[kind], mode)
            if mode
            else _SlotLayer(self._slots, banks[kind])
            for kind in kinds
        ]
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
                for part in (getattr(layer, name) for name in layer.names if layer.is_initialized)
            )
            for layer in self._slot_layers
        ]

    @property
    def states(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values [B, heads, capacity, head_dim] of every layer; None until all have some.

        The live rows of the storage itself: they stand until rows come or go, or it grows. None
        where they are quantized.
        """
        if self._slots.views is None:
            self._slots.views = self.rows(self._slots.num_rows)
        return self._slots.views

    def rows(self, num_rows: int) -> list[tuple[Tensor, Tensor]] | None:
        """Return keys and values of the first rows, live or not, as far as there are so many.

        At least the live ones; None as in `states`.
        """
        if self.mode or not all(layer.is_initialized for layer in self._slot_layers):
            return None
        if num_rows > len(self._slot_layers[0].keys):
            num_rows = self._slots.num_rows
        return [(layer.keys[:num_rows], layer.values[:num_rows]) for layer in self._slot_layers]

    @property
    def end(self) -> int:
        """Slot behind the last one that the cache was opened for."""
        return self._slots.end

    def widen(self, num_new: int) -> Tensor:
        """Make room for more tokens than the cache was opened for; returns their slots [B, n]."""
        self.open(num_new, self._slots.behind)
        return self.new_slots

    def restart(self, num_rows: int, num_slots: int) -> None:
        """Forget all tokens; what is allocated stays where it is and serves the next rows."""
        self._slots.num_rows, self._slots.views = num_rows, None
        self._set_lengths([0] * num_rows)
        self._grow(num_slots)

    @property
    def new_slots(self) -> Tensor:
        """Slots [B, n] int64 of the tokens that the cache was opened for."""
        slots = self._slots
        if slots.index is None:
            new = torch.arange(slots.start, slots.end, device=self.device)
            return new.expand(slots.num_rows, -1)
        return slots.index

    def newest(self, num_new: int) -> Tensor:
        """Return `key_values` [B, n, W] of the first tokens that the cache was opened for."""
        if len(self._banks) != 1 or not self._banks[0].states:
            raise ValueError(
                "the target's layers do not all cache keys and values of one shape on one device, "
                "so that no head can read them; use a drafter that reads hidden states"
            )
        slots, found = self._slots, []
        for states in self._states():
            live = states[:, : slots.num_rows]
            if slots.index is None:
                found.append(live.narrow(3, slots.start, num_new))
            else:
                index = slots.index[None, :, None, :num_new, None].to(live.device)
                found.append(torch.take_along_dim(live, index, 3))
        if self.mode:
            found = [decode(*pair, self.mode) for pair in zip(found[::2], found[1::2], strict=True)]
        return key_values(*found)

    def _states(self) -> Iterator[Tensor]:
        for bank in self._banks:
            yield from bank.states.values()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values allocated now, scales included."""
        return sum(states.nbytes for states in self._states())

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one row."""
        return sum(states[:, 0, :, 0].nbytes for states in self._states())

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes whatever its length."""
        return 0

    def open(self, num_new: int, behind: int = 0) -> int:
        """Make room for `num_new` tokens a row, `behind` the committed ones; returns the end slot.

        Slots between them keep what was written there: the levels of a tree before this one.
        """
        slots = self._slots
        slots.start, slots.behind = self.lengths[0] + behind, behind
        slots.end = max(self.lengths) + behind + num_new
        slots.index = None
        if not self.is_uniform:
            offsets = torch.arange(behind, behind + num_new, device=self.device)
            slots.index = self.device_lengths.unsqueeze(1) + offsets
        if slots.end > slots.capacity:
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
        """Move a tree's accepted `path` [B, D] (nodes, -1 padded) behind the root.

        Node i was written at length + 1 + i.
        """
        path = path[:, : self._slots.end - max(self.lengths) - 1]  # no longer than all nodes
        steps = torch.arange(path.shape[1], device=path.device)
        nodes = torch.where(path >= 0, path, steps)  # padding copies a slot onto itself
        if len(path) == 1:  # slices are cheaper
            start = self.lengths[0] + 1
            for states in self._states():
                behind = states[:, 0].narrow(2, start, self._slots.end - start)
                moved = behind.index_select(2, nodes[0].to(states.device))
                behind.narrow(2, 0, len(steps)).copy_(moved)
            return
        first = (self.device_lengths + 1).unsqueeze(1)
        to, source = first + steps, first + nodes
        for states in self._states():
            slots = states.transpose(2, 3)  # [layers, rows, capacity, heads, head_dim]
            rows = torch.arange(len(path), device=states.device).unsqueeze(1)
            slots[:, rows, to.to(states.device)] = slots[:, rows, source.to(states.device)]

    def append(self, other: "SlotCache") -> None:
        """Take the rows of another cache behind one's own; no copy of one's own where they fit."""
        first, num_slots = len(self.lengths), max(other.lengths)
        self._slots.num_rows, self._slots.views = first + len(other.lengths), None
        self._grow(num_slots)
        for bank, joining in zip(self._banks, other._banks, strict=True):
            if joining.states and not bank.states:  # rows without a token held no keys yet
                bank.allocate(joining.states, self._slots.num_rows, self._slots.capacity)
            for name, states in joining.states.items():
                rows = slice(first, first + states.shape[1])
                bank.states[name][:, rows, :, :num_slots] = states[:, :, :, :num_slots]
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
        self._slots.num_rows, self._slots.views = len(kept), None
        self._set_lengths([self.lengths[row] for row in kept])

    def resize(self, num_rows: int, num_slots: int) -> None:
        """Allocate exactly this many rows and slots a row; what is committed must fit.

        The next rows and tokens then find their room, and nothing grows before it is used up.
        """
        self._slots.capacity = num_slots
        for bank in self._banks:
            bank.resize(num_rows, num_slots)

    def make_room(self, num_rows: int, num_slots: int) -> bool:
        """Resize one of the states a call, until so many rows and slots can be appended.

        Returns False, having done nothing, once there is room.
        """
        capacity = self.capacity
        while capacity < num_slots:
            capacity *= 2
        for bank in self._banks:
            for name, states in bank.states.items():
                rows, slots = max(num_rows, states.shape[1]), max(capacity, states.shape[3])
                if (rows, slots) != (states.shape[1], states.shape[3]):
                    bank.resize(rows, slots, [name])
                    return True
        self._slots.capacity = capacity
        return False

    def wipe(self, rows: Sequence[int]) -> None:
        """Zero these rows: a masked place still takes part in 0 * value, and 0 * NaN is NaN."""
        for states in self._states():
            states[:, list(rows)] = 0

    def _grow(self, num_slots: int) -> None:
        """Make room for all rows, and double the slots of every row until they suffice."""
        slots, is_short = self._slots, num_slots > self._slots.capacity
        while slots.capacity < num_slots:
            slots.capacity *= 2
        for bank in self._banks:
            if bank.states and (is_short or bank.num_rows < slots.num_rows):
                bank.resize(max(bank.num_rows, slots.num_rows), slots.capacity)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.is_uniform = len(set(lengths)) <= 1
        self._device_lengths = None


def key_values(keys: Tensor, values: Tensor) -> Tensor:
    """The tap `KEYS_VALUES` [B, n, W] of states [layers, B, heads, n, head_dim]."""
    return torch.cat([keys, values], -1).permute(1, 3, 0, 2, 4).flatten(2)


def _allocate(like: Tensor, num_layers: int, num_rows: int, capacity: int) -> Tensor:
    """Allocate zeros, because a masked slot still takes part in 0 * value, and 0 * NaN is NaN."""
    shape = (num_layers, num_rows, like.shape[-3], capacity, like.shape[-1])
    try:
        return like.new_zeros(shape)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        wanted = math.prod(shape) * like.element_size()
        hint = "lower batch_size or max_new_tokens"
        if like.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(like.device)
            hint = f"{free:,} bytes are free, enough for batch_size {int(num_rows * free / wanted)}"
        raise MemoryError(
            f"no memory for {wanted:,} bytes of keys or values of {num_layers} layers (batch "
            f"{num_rows}, {capacity} slots a row); {hint}"
        ) from error
