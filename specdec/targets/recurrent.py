"""Recurrent layers of hybrid targets, with states that no rejected token ever enters.

A forward reads the state of the committed tokens and leaves it as it is: what each new node adds
is solved for along its own ancestors, so that a chain, a tree and ragged rows are one triangular
solve a layer. Committing adds up what the accepted path has brought, and nothing is rolled back.

Sources: gated delta rule, arXiv 2412.06464; Mamba-2, arXiv 2405.21060. Modeling files stay as they
are: a mixer runs its own forward, in which the functions that read and write states are ours.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers.activations import ACT2FN

from specdec.engine.kv_cache import SlotCache

# Tokens that are committed as they are read are solved for in blocks of so many.
_BLOCK = 64


@dataclass
class Nodes:
    """The tokens [B, n] of a forward: a chain, or a tree whose node 0 is the root.

    Attributes:
        visible: [B, n, n] the ancestors of every node, itself included; None for a chain.
        parents: [B, n] their places, -1 for the root's; None for a chain.
        counts: [B] tokens of a chain that are committed whatever comes of it; None if it is told
            later.
    """

    visible: Tensor | None = None
    parents: Tensor | None = None
    counts: Tensor | None = None


@dataclass
class _Written:
    """What the nodes of a forward would add to the state of a layer."""

    keys: Tensor  # [B, heads, n, key_dim]
    values: Tensor  # [B, heads, n, value_dim]
    decays: Tensor  # [B, heads, n, n] from every node to each of its ancestors, 0 elsewhere
    to_root: Tensor  # [B, heads, n] from the committed state to every node


class _State:
    """State [rows, heads, key_dim, value_dim] of a layer, and the last inputs of convolutions."""

    def __init__(self, cache: "HybridCache") -> None:
        self.cache = cache
        self.tensors: dict[Any, Tensor] = {}  # "state", and inputs [rows, channels, width] by place
        self.windows: dict[int, Tensor] = {}
        self.written: _Written | None = None

    def of_rows(self, name: Any, shape: Sequence[int], like: Tensor) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = like.new_zeros(self.cache.num_state_rows, *shape)
        return self.tensors[name][: len(like)]

    def see(self, inputs: Tensor, place: int, width: int) -> Tensor:
        """Windows [B, channels, n, width] that end with the inputs [B, channels, n]."""
        before = self.of_rows(place, (inputs.shape[1], width - 1), inputs)
        known = torch.cat([before, inputs], 2)
        if (index := self.cache.window_index(width, inputs.shape[2])) is None:
            windows = known.unfold(2, width, 1)
        else:
            flat = index.flatten(1).unsqueeze(1).to(known.device).expand(-1, inputs.shape[1], -1)
            windows = known.gather(2, flat).unflatten(2, index.shape[1:])
        self.windows[place] = windows
        return windows

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, beta: Tensor | None
    ) -> Tensor:
        """Outputs [B, heads, n, value_dim] of nodes [B, heads, n, dim].

        The logarithms of their decays and their betas are [B, heads, n]. Without `beta` values are
        added as they are (Mamba-2); with it a node writes what the state that it sees does not
        already hold of them (delta rule).
        """
        shape = keys.shape[1], keys.shape[3], values.shape[3]
        state = self.of_rows("state", shape, values)
        nodes, num_nodes = self.cache.nodes, keys.shape[2]
        if nodes.counts is None:
            outputs, self.written = _solve(state, queries, keys, values, decay, beta, nodes.visible)
            return outputs
        counts = nodes.counts.to(keys.device)
        real = torch.arange(num_nodes, device=keys.device) < counts.unsqueeze(1)
        decay = decay * real.unsqueeze(1)
        values = values * real[:, None, :, None]
        beta = beta if beta is None else beta * real.unsqueeze(1)
        found = []
        for start in range(0, num_nodes, _BLOCK):
            part = slice(start, start + _BLOCK)
            q, k, v, g = (each[:, :, part] for each in (queries, keys, values, decay))
            own = beta if beta is None else beta[:, :, part]
            outputs, written = _solve(state, q, k, v, g, own, None)
            last = torch.full_like(counts, outputs.shape[2] - 1)
            state.copy_(_added(state, written, last))
            found.append(outputs)
        return torch.cat(found, 2)

    def commit(self, last: Tensor, kept: Tensor) -> None:
        """Take over what the path to node `last` [B] brought, in rows that keep any [B]."""
        for name, tensor in self.tensors.items():
            last, kept, old = last.to(tensor.device), kept.to(tensor.device), tensor[: len(last)]
            if name in self.windows:
                rows = torch.arange(len(last), device=last.device)
                new = self.windows[name][rows, :, last, 1:]
            elif self.written is not None:
                new = _added(old, self.written, last)
            else:  # committed as it was read
                continue
            old.copy_(torch.where(kept.view(-1, *[1] * (old.ndim - 1)), new, old))
        self.forget()

    def forget(self) -> None:
        self.windows, self.written = {}, None


def _solve(
    state: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    visible: Tensor | None,
) -> tuple[Tensor, _Written]:
    num_nodes = keys.shape[2]
    if visible is None:
        visible = torch.ones(num_nodes, num_nodes, dtype=torch.bool, device=keys.device).tril()
    else:
        visible = visible.unsqueeze(1).to(keys.device)
    to_root = (visible * decay.unsqueeze(2)).sum(-1)
    between = to_root.unsqueeze(3) - to_root.unsqueeze(2)
    decays = between.masked_fill(~visible, -torch.inf).exp()
    to_root = to_root.exp()
    if beta is not None:
        rest = values - to_root.unsqueeze(3) * (keys @ state)
        overlap = beta.unsqueeze(3) * decays * (keys @ keys.mT)
        values = torch.linalg.solve_triangular(
            overlap, beta.unsqueeze(3) * rest, upper=False, unitriangular=True
        )
    outputs = to_root.unsqueeze(3) * (queries @ state) + (decays * (queries @ keys.mT)) @ values
    return outputs, _Written(keys, values, decays, to_root)


def _added(state: Tensor, written: _Written, last: Tensor) -> Tensor:
    """State behind node `last` [B]."""
    rows = torch.arange(len(last), device=last.device)
    weights = written.decays[rows, :, last].unsqueeze(3)
    decayed = written.to_root[rows, :, last][:, :, None, None] * state
    return decayed + (weights * written.keys).mT @ written.values


class HybridCache(SlotCache):
    """A `SlotCache` whose model has recurrent layers as well, one state a row and layer.

    `nodes` says what the next forward runs over.
    """

    def __init__(self, *args: Any) -> None:
        self._recurrent: dict[int, _State] = {}
        self.nodes = Nodes()
        self._path: Tensor | None = None
        self._indices: dict[int, Tensor | None] = {}
        super().__init__(*args)

    @property
    def num_state_rows(self) -> int:
        """Rows that there is room for."""
        return max([self._slots.num_rows, *(len(tensor) for _, _, tensor in self._tensors())])

    # What mixers ask of a cache.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        return self._of(layer_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Lay the windows of all nodes side by side, for `convolved`."""
        width = kwargs["conv_kernel_size"]
        return self._of(layer_idx).see(conv_states, state_idx, width).flatten(2)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _of(self, layer_idx: int) -> _State:
        return self._recurrent.setdefault(layer_idx, _State(self))

    def run_over(self, nodes: Nodes) -> None:
        self.nodes, self._path, self._indices = nodes, None, {}
        for state in self._recurrent.values():
            state.forget()

    def window_index(self, width: int, num_nodes: int) -> Tensor | None:
        """Places [B, n, width] of every node's window among old inputs and the nodes' own."""
        if (parents := self.nodes.parents) is None:
            return None
        if width not in self._indices:
            old = torch.arange(-1, width - 2, device=parents.device).clamp(min=0)
            before = torch.cat([old.expand(len(parents), -1), parents + width - 1], 1)
            found = [torch.arange(num_nodes, device=parents.device).expand_as(parents) + width - 1]
            while len(found) < width:
                found.append(before.gather(1, found[-1]))
            self._indices[width] = torch.stack(found[::-1], 2)
        return self._indices[width]

    def gather_path(self, path: Tensor) -> None:
        super().gather_path(path)
        self._path = path

    def extend(self, counts: Sequence[int]) -> None:
        super().extend(counts)
        if (known := self.nodes.counts) is not None:
            last = known
        elif (path := self._path) is None:
            last = torch.tensor(counts, device=self.device)
        else:
            depths = torch.tensor(counts, device=self.device) - 2
            last = path.gather(1, depths.clamp(min=0).unsqueeze(1)).squeeze(1) + 2
            last = torch.where(depths < 0, depths + 2, last)
        for state in self._recurrent.values():
            state.commit((last - 1).clamp(min=0), last > 0)
        self.run_over(Nodes())

    def _tensors(self) -> Iterator[tuple[_State, Any, Tensor]]:
        for state in self._recurrent.values():
            for name, tensor in [*state.tensors.items()]:
                yield state, name, tensor

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(tensor.nbytes for _, _, tensor in self._tensors())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, whatever its length."""
        return sum(tensor[0].nbytes for _, _, tensor in self._tensors())

    def restart(self, num_rows: int, num_slots: int) -> None:
        super().restart(num_rows, num_slots)
        self._recurrent = {}

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        for state, name, tensor in self._tensors():
            state.tensors[name] = tensor[rows.to(tensor.device)]

    def append(self, other: SlotCache) -> None:
        first = len(self.lengths)
        super().append(other)
        assert isinstance(other, HybridCache)
        for layer, joining in other._recurrent.items():
            own = self._of(layer)
            for name, tensor in joining.tensors.items():
                new = tensor[: len(other.lengths)]
                old = own.tensors.get(name)
                if old is None:
                    old = new.new_zeros(first, *new.shape[1:])
                own.tensors[name] = torch.cat([old[:first], new])

    def resize(self, num_rows: int, num_slots: int) -> None:
        super().resize(num_rows, num_slots)
        for state, name, tensor in self._tensors():
            missing = num_rows - len(tensor)
            if missing > 0:
                state.tensors[name] = torch.cat(
                    [tensor, tensor.new_zeros(missing, *tensor.shape[1:])]
                )

    def wipe(self, rows: Sequence[int]) -> None:
        super().wipe(rows)
        for _, _, tensor in self._tensors():
            tensor[list(rows)] = 0


# The functions of mixers that states go through, and what stands for them.


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Outputs [B, channels, n] of windows [B, channels, n * width] side by side."""
    outputs = (x.unflatten(2, (-1, weight.shape[1])) * weight.unsqueeze(1)).sum(-1)
    if bias is not None:
        outputs = outputs + bias.unsqueeze(1)
    return outputs if activation is None else ACT2FN[activation](outputs)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Any = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Gated delta rule over nodes [B, n, heads, dim]."""
    own, dtype = value.dtype, torch.promote_types(value.dtype, torch.float32)
    query, key, value, g, beta = (
        each.transpose(1, 2).to(dtype) for each in (query, key, value, g, beta)
    )
    if use_qk_l2norm_in_kernel:
        query, key = (
            each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (query, key)
        )
    groups = value.shape[1] // key.shape[1]
    query, key = (each.repeat_interleave(groups, 1) for each in (query, key))
    outputs = initial_state.attend(query * query.shape[-1] ** -0.5, key, value, g, beta)
    return outputs.transpose(1, 2).contiguous().to(own), None


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    rates: Tensor,
    keys: Tensor,
    queries: Tensor,
    *,
    dt_bias: Tensor,
    initial_states: Any,
    z: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **given: Any,
) -> tuple[Tensor, None]:
    """Mamba-2 over nodes [B, n, heads, head_dim]; keys (B), queries (C) are [B, n, groups, N]."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    values, keys, queries = (x.transpose(1, 2).to(dtype) for x in (hidden_states, keys, queries))
    groups = values.shape[1] // keys.shape[1]
    keys, queries = (each.repeat_interleave(groups, 1) for each in (keys, queries))
    steps = softplus(dt.to(dtype) + dt_bias).clamp(*dt_limit).transpose(1, 2)  # [B, heads, n]
    decay = steps * rates.to(dtype).unsqueeze(1)
    outputs = initial_states.attend(queries, keys, steps.unsqueeze(3) * values, decay, None)
    outputs = outputs + given["D"][:, None, None] * values
    outputs = outputs.transpose(1, 2).contiguous()
    return (outputs if z is None else outputs * silu(z)), None


def state_update(
    state: Any,
    hidden_states: Tensor,
    dt: Tensor,
    rates: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor,
    **_: Any,
) -> Tensor:
    """Mamba-2 over one node a row, as mixers call it: what is of a head stands once a channel."""
    one, steps, keys, queries = (
        x.unsqueeze(1) for x in (hidden_states, dt[:, :, 0], keys, queries)
    )
    gate = z if z is None else z.unsqueeze(1)
    outputs, _nothing = chunk_scan(
        *(one, steps, rates[:, 0, 0], keys, queries),
        dt_bias=dt_bias[:, 0],
        initial_states=state,
        z=gate,
        D=skip[:, 0],
    )
    return outputs.squeeze(1)


_CONVOLUTION = "causal_conv1d_fn"
_RULES: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "torch_recurrent_gated_delta_rule": delta_rule,
    "mamba2_chunk_scan": chunk_scan,
    "mamba2_selective_state_update": state_update,
}
OURS = {_CONVOLUTION: convolved, **_RULES}
_WRITES = {"update_conv_state", "update_recurrent_state"}


def mixers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that keep a state of their own."""
    for module in model.modules():
        if _WRITES & {*_code(module).co_names}:
            yield module


def _code(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward).__code__


def unknown_mixers(model: nn.Module) -> list[str]:
    """Names of classes whose states are none that are known here."""
    names = []
    for module in mixers(model):
        called = {*_code(module).co_names}
        is_known = _CONVOLUTION in called and (
            called & {*_RULES} or "update_recurrent_state" not in called
        )
        if not is_known:
            names.append(type(module).__name__)
    return sorted(set(names))


def use_states(model: nn.Module) -> None:
    """Let mixers run on a `HybridCache`; with any other cache they run as before."""
    for module in mixers(model):
        own = inspect.unwrap(type(module).forward)
        ours = FunctionType(own.__code__, {**own.__globals__, **OURS}, closure=own.__closure__)
        ours.__kwdefaults__, ours.__defaults__ = own.__kwdefaults__, own.__defaults__
        name = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # below hooks
        theirs = getattr(module, name)
        if getattr(theirs, "func", None) is not _forward:  # of another target on the same model
            setattr(module, name, partial(_forward, theirs, MethodType(ours, module)))


def _forward(theirs: Any, ours: Any, *args: Any, **kwargs: Any) -> Any:
    is_ours = any(isinstance(each, HybridCache) for each in (*args, *kwargs.values()))
    return (ours if is_ours else theirs)(*args, **kwargs)
