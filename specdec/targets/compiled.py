"""A causal LM in compiled pieces or as CUDA graphs, its modeling file as it is.

What comes before its layers is one piece, and what comes after them another. One decoder layer of
each kind is compiled and serves all layers of that kind, each with its own weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten
from transformers.cache_utils import Cache

from specdec.common.compile import (
    CAPACITY,
    ROWS,
    SEEN,
    WIDTH,
    CannotCompileError,
    Graphs,
    Piece,
    bucket,
    compile_piece,
    fixed,
    tensors_of,
)
from specdec.engine.kv_cache import SlotCache
from specdec.targets.taps import TapReader

# Of forwards with more tokens than this, padding included, the time is no longer that of launches.
MOST_TOKENS = 1024
# Graphs see slots in such steps.
SEEN_STEP = 256

# Keys and values of every layer, [B, heads, capacity, head_dim] each.
States = Sequence[tuple[Tensor, Tensor]]
# The arguments of a model's own forward, for a `Forward` and a cache.
Arguments = Callable[["Forward", Any], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward behind what a cache holds: B rows of n new tokens, which see K slots.

    Attributes:
        tokens: [B, n] int64.
        positions: [B, n] int64.
        mask: [B, 1, n, K], or one for each type of layer.
        slots: [B, n] int64, where keys and values of the new tokens are written; None where the
            cache knows.
    """

    tokens: Tensor
    positions: Tensor
    mask: Any
    slots: Tensor | None = None

    @property
    def given(self) -> list[Tensor]:
        """The tensors that a model is called with."""
        return [self.tokens, self.positions, *tree_leaves(self.mask)]

    def replaced(self, given: Sequence[Tensor]) -> "Forward":
        """The same forward with other tensors."""
        tokens, positions, *masks = given
        mask = tree_unflatten(masks, tree_structure(self.mask))
        return Forward(tokens, positions, mask, self.slots)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a layer: its arguments one by one, the first of them what the layer changes."""

    leaves: list[Any]
    spec: Any
    output: Any = None

    @classmethod
    def of(cls, args: Any, kwargs: Any, output: Any = None) -> "_Call":
        leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Cache))
        return cls(leaves, spec, output)

    def find(self, tensor: Tensor) -> int | None:
        """Return the place of an argument."""
        return next((i for i, leaf in enumerate(self.leaves) if leaf is tensor), None)


@dataclass(frozen=True, eq=False)
class _Structure:
    """A model as two forwards of different sizes have shown it.

    Attributes:
        model: the causal LM.
        layers: its decoder layers.
        arguments: maker of the model's own arguments.
        forward: the first of the two forwards.
        calls: the calls of all layers in it.
        states: its keys and values.
        shared: tensors that layers are given beside their input: the caller's, then the model's.
        names: names of the sizes of each shared tensor.
        hidden_names: names of the sizes of a layer's input.
        state_names: names of the sizes of keys and values.
    """

    model: Any
    layers: nn.ModuleList
    arguments: Arguments
    forward: Forward
    calls: list[_Call]
    states: States
    shared: list[Tensor]
    names: list[list[str | None]]
    hidden_names: list[str | None]
    state_names: list[str | None]

    @classmethod
    def of(
        cls,
        model: Any,
        layers: nn.ModuleList,
        arguments: Arguments,
        examples: Iterable[tuple[Forward, States]],
    ) -> "_Structure":
        # Each example stands while its cache does: the next one is asked for later.
        seen = [(f, s, _watch(model, layers, arguments(f, None))) for f, s in examples]
        forwards, states, calls = zip(*seen, strict=True)
        shared = [
            _unique([*f.given, *(leaf for call in found for leaf in call.leaves[1:])])
            for f, _, found in seen
        ]
        if len({*map(len, shared)}) > 1:
            raise CannotCompileError("it gives its layers more tensors at some sizes")
        sizes: list[dict[str, int]] = []
        for each, (keys, _), *_ in ((f.given, *s) for f, s, _ in seen):
            rows, _, width, num_seen = each[2].shape
            named = {ROWS: rows, WIDTH: width, SEEN: num_seen, CAPACITY: keys.shape[2]}
            assert not sizes or all(named[name] != n for name, n in sizes[0].items())
            sizes.append(named)

        def names(*tensors: Tensor) -> list[str | None]:
            return _names(tensors, sizes)

        return cls(
            model,
            layers,
            arguments,
            forwards[0],
            calls[0],
            states[0],
            shared[0],
            [names(*pair) for pair in zip(*shared, strict=True)],
            names(*(found[0].leaves[0] for found in calls)),
            names(*(found[0][0] for found in states)),
        )

    @property
    def made(self) -> list[tuple[int, int]]:
        """Layer and argument where each tensor stands that the model made for its layers."""
        places = []
        for tensor in self.shared[len(self.forward.given) :]:
            found = ((layer, call.find(tensor)) for layer, call in enumerate(self.calls))
            places.append(next((layer, leaf) for layer, leaf in found if leaf is not None))
        return places

    def run_ends(
        self, weights: dict[str, Tensor], given: Sequence[Tensor], last: Tensor | None
    ) -> tuple[list[_Call], Any]:
        """Run the model without its layers; the last of them returns `last`."""
        seen: list[_Call] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            seen.append(_Call.of(args, kwargs))
            is_last = len(seen) == len(self.layers) and last is not None
            output = last if is_last else seen[-1].leaves[0]
            return (output,) if isinstance(self.calls[0].output, tuple) else output

        arguments = self.arguments(self.forward.replaced(given), None)
        try:
            for layer in self.layers:
                layer.forward = stub
            return seen, functional_call(self.model, weights, (), arguments)
        finally:
            for layer in self.layers:
                del layer.forward


class StepCache(Cache):
    """Keys and values for one forward, written by index: of one layer alone, or of all."""

    def __init__(self, states: States, slots: Tensor, num_seen: int) -> None:
        self.layers = []  # which a model may ask for their kinds
        self._states, self._slots, self._num_seen = states, slots, num_seen

    def get_seq_length(self, *_: Any) -> int:
        return 0  # no model needs it that is told positions and masks

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self._num_seen, 0

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self._slots.shape[0], device=self._slots.device).unsqueeze(1)
        keys, values = self._states[layer_idx if len(self._states) > 1 else 0]
        for stored, new in ((keys, key_states), (values, value_states)):
            # Inductor writes in place by `index_put_`, and copies the whole cache for `scatter_`.
            stored.transpose(1, 2).index_put_((rows, self._slots), new.transpose(1, 2))
        return self._seen(keys), self._seen(values)

    def _seen(self, stored: Tensor) -> Tensor:
        """All that may be attended; a slice would ask if there are so many slots."""
        rows, heads, _, size = stored.shape
        return stored.as_strided((rows, heads, self._num_seen, size), stored.stride())


class CompiledLM:
    """The forward of a causal LM in compiled pieces, which hands out its hidden states as well.

    Args:
        model: the causal LM, whole on one device.
        layers: its decoder layers.
        arguments: makes the model's own arguments; without a cache it takes that of the examples.
        examples: yields two forwards of other sizes each, with the keys and values of all layers,
            when the cache is ready for them.

    Raises:
        CannotCompileError: its layers do not simply follow each other, or a piece cannot be
            exported or compiled.
    """

    def __init__(
        self,
        model: Any,
        layers: nn.ModuleList,
        arguments: Arguments,
        examples: Iterable[tuple[Forward, States]],
    ) -> None:
        found = _Structure.of(model, layers, arguments, examples)
        inside = {id(t) for layer in layers for t in tensors_of(layer).values()}
        ends = {name: t for name, t in tensors_of(model).items() if id(t) not in inside}
        self._ends = [*ends.values()]
        self._front, self._back = _compile_ends(found, ends)
        pieces: dict[str, Piece] = {}
        self._layers = [_compile_layer(found, place, pieces) for place in range(len(layers))]
        self._weights = [[*tensors_of(layer).values()] for layer in layers]

    def __call__(self, forward: Forward, states: States) -> tuple[Tensor, list[Tensor]]:
        """Run a forward; writes its keys and values into `states`.

        Returns:
            logits [B, n, V], and the hidden states [B, n, H] before each layer and after the norm.
        """
        given = [each.contiguous() for each in forward.given]
        assert forward.slots is not None
        slots, hidden_states = forward.slots.contiguous(), []
        hidden, *made = self._front([*given, *self._ends])
        shared = [*given, *made]
        layers = zip(self._layers, self._weights, states, strict=True)
        for (piece, places), weights, (keys, values) in layers:
            hidden_states.append(hidden)
            beside = [shared[place] for place in places]
            (hidden,) = piece([hidden, *beside, keys, values, slots, *weights])
        logits, last = self._back([hidden, *given, *self._ends])
        return logits, [*hidden_states, last]


class GraphedLM:
    """The forward of a causal LM as CUDA graphs, padded so that few of them serve all sizes.

    Args:
        model: the causal LM.
        taps: reads its hidden states.
        arguments: makes the model's own arguments.
        device: its device.
    """

    def __init__(self, model: Any, taps: TapReader, arguments: Arguments, device: Any) -> None:
        self._model, self._taps, self._arguments, self._device = model, taps, arguments, device
        self._graphs: dict[tuple[int, ...], Graphs] = {}

    def __call__(
        self, forward: Forward, cache: SlotCache, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Run a forward behind what is cached; None where it is too large for a graph.

        Returns:
            logits [B, n, V] and the taps [B, n, H].
        """
        batch, width = forward.tokens.shape
        padded_rows, padded_width = bucket(batch), bucket(width)
        if padded_rows * padded_width > MOST_TOKENS:
            return None
        slots = cache.widen(padded_width)  # [B, n']
        states = cache.rows(padded_rows)
        if states is None:
            return None
        padded_rows = len(states[0][0])
        num_seen = seen_slots(cache)
        rows, columns = padded_rows - batch, padded_width - width
        masks, spec = tree_flatten(forward.mask)
        hidden = [_hidden_value(mask) for mask in masks]
        masks = [
            pad(mask, (0, num_seen - mask.shape[3], 0, columns, 0, 0, 0, rows), value=value)
            for mask, value in zip(masks, hidden, strict=True)
        ]
        for mask in masks:  # padding sees one slot, because a softmax over none is NaN
            shown = True if mask.dtype == torch.bool else 0.0
            mask[batch:, :, :, 0] = shown
            mask[:, :, width:, 0] = shown
        tokens, positions = (
            pad(each, (0, columns, 0, rows)) for each in (forward.tokens, forward.positions)
        )
        own = torch.arange(padded_width, device=self._device).expand(rows, -1)
        given = [tokens, positions, torch.cat([slots, own]), *masks]
        graphs = self._graphs.get(tuple(taps))
        if graphs is None:
            graphs = self._graphs[tuple(taps)] = self._graphs_with(taps, spec, len(masks))
        logits, *found = graphs(given, [each for pair in states for each in pair])
        cut = [each[:batch, :width] for each in found]
        return logits[:batch, :width], dict(zip(taps, cut, strict=True))

    def _graphs_with(self, taps: Sequence[int], spec: Any, num_masks: int) -> Graphs:
        def run(tokens: Tensor, positions: Tensor, slots: Tensor, *rest: Tensor) -> list[Tensor]:
            masks, held = rest[:num_masks], rest[num_masks:]
            forward = Forward(tokens, positions, tree_unflatten(masks, spec), slots)
            states = [*zip(held[::2], held[1::2], strict=True)]
            cache = StepCache(states, slots, masks[0].shape[-1])
            arguments = self._arguments(forward, cache)
            out, hidden = self._taps.run(
                lambda own: self._model(**arguments, output_hidden_states=own), taps
            )
            return [out.logits, *(hidden[tap] for tap in taps)]

        return Graphs(run, self._device)


def seen_slots(cache: SlotCache) -> int:
    """Return the slots that a graph shows: all that the cache was opened for, and some more."""
    return min(-(-cache.end // SEEN_STEP) * SEEN_STEP, cache.capacity)


def _hidden_value(mask: Tensor) -> float:
    return 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def _watch(model: Any, layers: nn.ModuleList, arguments: dict[str, Any]) -> list[_Call]:
    """Run a model and note the calls of its layers, which must follow each other."""
    calls: list[_Call] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output: calls.append(_Call.of(args, kwargs, output)),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [each.output[0] if isinstance(each.output, tuple) else each.output for each in calls]
    follows = [call.leaves[0] is before for call, before in zip(calls[1:], outputs, strict=False)]
    if len(calls) != len(layers) or not all(follows):
        raise CannotCompileError("its layers do not simply follow each other")
    return calls


def _compile_ends(found: _Structure, ends: dict[str, Tensor]) -> tuple[Piece, Piece]:
    """Compile what comes before the first layer, and what comes after the last one."""
    made, num_given = found.made, len(found.forward.given)

    def front(*inputs: Tensor) -> list[Tensor]:
        weights = dict(zip(ends, inputs[num_given:], strict=True))
        calls, _ = found.run_ends(weights, inputs[:num_given], None)
        return [calls[0].leaves[0], *(calls[layer].leaves[leaf] for layer, leaf in made)]

    def back(hidden: Tensor, *inputs: Tensor) -> list[Tensor]:
        weights, states = dict(zip(ends, inputs[num_given:], strict=True)), []
        hook = found.model.get_decoder().register_forward_hook(
            lambda _, args, output: states.append(output.last_hidden_state)
        )
        try:
            _, out = found.run_ends(weights, inputs[:num_given], hidden)
        finally:
            hook.remove()
        return [out.logits, *states]

    given = [*found.forward.given, *ends.values()]
    names = [*found.names[:num_given], *map(fixed, ends.values())]
    hidden = found.calls[0].leaves[0]
    return (
        compile_piece(front, given, names),
        compile_piece(back, [hidden, *given], [found.hidden_names, *names]),
    )


def _compile_layer(
    found: _Structure, place: int, pieces: dict[str, Piece]
) -> tuple[Piece, list[int]]:
    """Compile a layer, or find the piece of its kind; and the shared tensors it is given."""
    layer, call, (keys, values) = found.layers[place], found.calls[place], found.states[place]
    tensors = tensors_of(layer)
    leaves = [i for i, leaf in enumerate(call.leaves) if i and isinstance(leaf, Tensor)]
    beside = [next(k for k, t in enumerate(found.shared) if t is call.leaves[i]) for i in leaves]
    mask = next((i for i, k in enumerate(beside) if found.names[k][-1] == SEEN), None)
    if mask is None:
        raise CannotCompileError("a layer is not given the mask that the model was called with")
    constants = [leaf for leaf in call.leaves if not isinstance(leaf, Tensor | Cache)]
    shapes = [(t.shape, t.dtype, t.device) for t in (*tensors.values(), keys, values)]
    kind = repr((_settings(layer), list(tensors), shapes, constants, beside, leaves))

    def run(hidden: Tensor, *inputs: Tensor) -> list[Tensor]:
        given, inputs = inputs[: len(beside)], inputs[len(beside) :]
        cache = StepCache([(inputs[0], inputs[1])], inputs[2], given[mask].shape[-1])
        arguments = [cache if isinstance(leaf, Cache) else leaf for leaf in call.leaves]
        for i, tensor in zip((0, *leaves), (hidden, *given), strict=True):
            arguments[i] = tensor
        args, kwargs = tree_unflatten(arguments, call.spec)
        weights = dict(zip(tensors, inputs[3:], strict=True))
        output = functional_call(layer, weights, args, kwargs)
        return [output[0] if isinstance(output, tuple) else output]

    if kind not in pieces:
        assert found.forward.slots is not None
        given = [call.leaves[0], *(found.shared[k] for k in beside), keys, values]
        names = [found.hidden_names, *(found.names[k] for k in beside), *[found.state_names] * 2]
        inputs = [*given, found.forward.slots, *tensors.values()]
        own = map(fixed, tensors.values())
        pieces[kind] = compile_piece(run, inputs, [*names, [ROWS, WIDTH], *own])
    return pieces[kind], beside


def _settings(layer: nn.Module) -> list[Any]:
    """List the plain attributes that may make two layers of one class differ; not their number."""
    return [
        (name, type(module).__qualname__, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | None) and key not in ("layer_idx", "training")
    ]


def _unique(values: Iterable[Any]) -> list[Tensor]:
    """Return each tensor once."""
    return [*{id(value): value for value in values if isinstance(value, Tensor)}.values()]


def _names(tensors: Sequence[Tensor], sizes: Sequence[dict[str, int]]) -> list[str | None]:
    """Name each size of the same tensor in several forwards; None where it is the same in all."""
    names: list[str | None] = []
    for found in zip(*(tensor.shape for tensor in tensors), strict=True):
        pairs = [*zip(sizes, found, strict=True)]
        fits = [name for name in sizes[0] if all(size[name] == n for size, n in pairs)]
        if len({*found}) > 1 and not fits:
            raise CannotCompileError(f"it makes tensors of a size that follows none given: {found}")
        names.append(fits[0] if len({*found}) > 1 else None)
    return names
