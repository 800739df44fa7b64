"""Weights shared out among processes by torch's FSDP2.

Accelerate has a plugin for it, which on CPUs does nothing and says nothing; this is short enough.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    device: torch.device,
    num_processes: int,
    mixed_precision: str,
) -> None:
    """Make every parameter a `DTensor` of which each process holds a part.

    Args:
        model: whose forward makes the loss; the same in all processes.
        units: parts of it that are gathered one after the other; what is outside of them is
            gathered for the whole forward.
        device: of this process.
        num_processes: in all.
        mixed_precision: "no", "bf16" or "fp16"; gradients are summed in float32 in any case.

    Raises:
        ValueError: a quantised parameter.
    """
    _require_floats(model)
    mesh = init_device_mesh(device.type, (num_processes,))
    dtype = _DTYPES.get(mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*units, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the weights of a model whole; nothing where it is not sharded.

    All processes enter together. Inside, each may call what it likes, as often as it likes,
    without gradients, but for a first forward of the model itself.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    inner = [part for part in parts if part is not model]
    for part in parts:
        part.unshard()
    # The model itself stays whole behind its forward anyway.
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)


def set_gradient_sync(model: nn.Module, is_on: bool) -> None:
    """Whether the next backward pass of a sharded model exchanges gradients."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_on)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if it is sharded; all processes call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, is_kept: bool) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers of a module, on the CPU.

    All processes call together.

    Args:
        module: sharded or not.
        is_kept: whether this process wants them; else it gets none, and needs no memory for them.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if is_kept else gathered.new_empty(0)
        if is_kept:
            found[name] = seen[id(tensor)]
    return found


def _require_floats(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ValueError(
                f"config sharding is 'fsdp2', but {name.removeprefix('module.')!r} is quantised "
                f"({str(weight.dtype).removeprefix('torch.')}), which cannot be sharded; set "
                "sharding=none, where every process holds the base, or "
                "drafter.options.method=lora"
            )
