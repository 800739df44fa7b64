"""Draft heads by name: built new for a target, or loaded from a checkpoint."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from specdec.checkpoints import KINDS, HeadCheckpoint, check_target, identify_target, read_head
from specdec.drafters.training import LossOutput, TrainingBatch
from specdec.targets.load import LOADING


def build_head(kind: str, options: dict[str, Any], target: Any) -> nn.Module:
    """A new head for a target, in float32 on its device.

    Args:
        kind: one of `KINDS`.
        options: of `specdec.drafters.{kind}.build`.
        target: an `HFTarget`; the head shares its embedding and vocabulary projection, which are
            no parameters of the head.

    Raises:
        ValueError: no such kind, or an option that it does not have.
    """
    _check_kind(kind)
    embedding = target.model.get_input_embeddings()
    projection = target.model.get_output_embeddings()
    try:
        head: nn.Module = _module(kind).build(options, target.config, embedding, projection)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{kind} head cannot use its options ({error})") from error
    return head.to(target.device)


def head_loss(kind: str, head: nn.Module, batch: TrainingBatch, **options: Any) -> LossOutput:
    """The loss that a head of this kind is trained with; options as in its file."""
    _check_kind(kind)
    result: LossOutput = _module(kind).loss(head, batch, **options)
    return result


def load_head(
    kind: str, target: Any, path: str, *, force: bool = False, dtype: torch.dtype | None = None
) -> tuple[nn.Module, HeadCheckpoint]:
    """Load a head for a target, in eval mode and the target's dtype.

    Args:
        kind: what the drafter needs.
        target: an `HFTarget`.
        path: folder or hub id in any known layout, or "demo".
        force: take a head that was trained for another target of the same shape.
        dtype: of the head; None for the target's.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a head of another kind or for another target; tensors that are missing, left
            over, of a wrong shape or not finite.
    """
    checkpoint = read_head(path)
    if checkpoint.kind != kind:
        raise ValueError(
            f"{path!r} holds a head of the kind {checkpoint.kind!r}, not {kind!r}; load it with "
            f"type={checkpoint.kind}"
        )
    check_target(checkpoint, identify_target(target), force=force)
    with LOADING:
        head = build_head(kind, checkpoint.options, target)
    fill_head(head, checkpoint.tensors, path)
    return head.to(dtype or target.model.dtype).eval(), checkpoint


def fill_head(head: nn.Module, tensors: dict[str, Tensor], path: str) -> None:
    """Give a head its tensors, all of them and no others.

    Raises:
        ValueError: the first tensor that is missing, left over, mis-shaped or not finite, by name.
    """
    wanted = head.state_dict()
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path!r} lacks the tensor {name}; the checkpoint is incomplete")
        given = tensors[name]
        if given.shape != tensor.shape:
            raise ValueError(
                f"{path!r}: {name} has shape {tuple(given.shape)} but must have "
                f"{tuple(tensor.shape)}; the checkpoint or its config is of another head"
            )
        if given.is_floating_point() and not given.isfinite().all():
            raise ValueError(f"{path!r}: {name} holds NaN or infinite values; train it again")
    left = sorted(set(tensors) - set(wanted))
    if left:
        raise ValueError(
            f"{path!r} has {len(left)} tensors that this head does not have, {left[0]} for one"
        )
    head.load_state_dict(tensors)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"head kind is {kind!r} but must be one of {', '.join(KINDS)}")


def _module(kind: str) -> Any:
    return import_module(f"specdec.drafters.{kind}")
