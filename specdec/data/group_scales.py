"""int8 with a scale for every group of channels."""

import torch
from torch import Tensor

_LARGEST = 127


def to_int8(states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round states to codes.

    Args:
        states: [..., H] of a floating dtype, finite.
        group_size: neighbouring channels that share a scale; 0: all of them.

    Returns:
        Codes [..., H] int8 and scales [..., G] bfloat16; code times scale is off by at most half
        a scale.
    """
    size = states.shape[-1]
    groups = _grouped(states.float(), group_size)
    scales = (groups.abs().amax(-1) / _LARGEST).bfloat16()
    # Codes are made with the scale as it is stored; where that is 0, so are the codes.
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    codes = (groups / steps).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes.flatten(-2)[..., :size], scales


def from_int8(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """States [..., H] float32 of codes [..., H] and scales [..., G]."""
    groups = _grouped(codes.float(), group_size) * scales.float().unsqueeze(-1)
    return groups.flatten(-2)[..., : codes.shape[-1]]


def _grouped(states: Tensor, group_size: int) -> Tensor:
    """[..., H] to [..., G, group_size], the last group filled up with zeros."""
    width = group_size or states.shape[-1]
    padded = torch.nn.functional.pad(states, (0, -states.shape[-1] % width))
    return padded.unflatten(-1, (-1, width))
