"""Keys and values in few bits: codes, and a scale for every 32 channels of one token.

Nothing depends on another token. What is read of a token is therefore the same in whatever forward
it was written, alone, in a chunk or as a node of a tree, and speculative decoding with a quantized
cache is plain decoding with the same one. Scales over several tokens, or a window of tokens that
are not quantized yet, would depend on where steps end.

Source: groups within a token, as in ExLlamaV3; asymmetric ones over tokens: KIVI, arXiv 2402.02750.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32  # channels that share a scale
# The largest level of each mode: levels are symmetric, so that zero is one of them.
MODES = {"fp8": 448, "int8": 127, "int6": 31, "int4": 7}
_PACKED = {"int6": 4, "int4": 2}  # values that share bytes


def mode_of(cache: str | None) -> str | None:
    """Return a mode, or None for keys and values as the model makes them."""
    if cache not in (None, "none", *MODES):
        raise ValueError(f"cache is {cache!r} but must be one of none, {', '.join(MODES)}")
    return None if cache == "none" else cache


def encode(states: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Quantize keys or values by the largest of each group.

    Args:
        states: [..., D] floats.
        mode: "fp8" (e4m3) or "int8", a byte a value; "int6", four values in three bytes; "int4",
            two values a byte.

    Returns:
        codes [..., bytes] uint8 and scales [..., groups] in the dtype of the states. A group that
        is not finite is not finite when it is read, either.

    Raises:
        ValueError: D values do not fill whole bytes.
    """
    size, most = states.shape[-1], MODES[mode]
    if size % _PACKED.get(mode, 1):
        raise ValueError(
            f"cache is {mode!r}, which packs {_PACKED[mode]} values together, but a head has "
            f"{size}; use int8"
        )
    groups = _grouped(states.float())
    scales = (groups.abs().amax(-1) / most).to(states.dtype)
    # Codes are of the scale as it is stored: rounded, and 0 where a group holds nothing else.
    levels = groups / torch.where(scales > 0, scales, 1).unsqueeze(-1)
    levels = levels.flatten(-2)[..., :size].clamp(-most, most)
    if mode == "fp8":
        return levels.to(torch.float8_e4m3fn).view(torch.uint8), scales
    levels = levels.round()
    if mode == "int8":
        return levels.to(torch.int8).view(torch.uint8), scales
    parts = (levels + (most + 1)).to(torch.uint8).chunk(_PACKED[mode], -1)
    if mode == "int4":
        return parts[0] | parts[1] << 4, scales
    last = parts[3]  # two bits of it beside each of the others
    return torch.cat([part | (last >> 2 * i) << 6 for i, part in enumerate(parts[:3])], -1), scales


def decode(codes: Tensor, scales: Tensor, mode: str) -> Tensor:
    """Return what `encode` has kept, [..., D] in the dtype of the scales."""
    if mode == "fp8":
        levels = codes.view(torch.float8_e4m3fn).to(scales.dtype)
    elif mode == "int8":
        levels = codes.view(torch.int8).to(scales.dtype)
    else:
        if mode == "int4":
            parts = [codes & 15, codes >> 4]
        else:
            low, middle, high = (codes >> 6).chunk(3, -1)
            parts = [codes & 63, low | middle << 2 | high << 4]
        levels = torch.cat(parts, -1).to(scales.dtype) - (MODES[mode] + 1)
    values = _grouped(levels) * scales.unsqueeze(-1)
    return values.flatten(-2)[..., : levels.shape[-1]]


def _grouped(states: Tensor) -> Tensor:
    """Groups [..., groups, size] of [..., D]; the last one is filled up with zeros."""
    size = states.shape[-1]
    group = min(GROUP, size)
    missing = -size % group
    return (pad(states, (0, missing)) if missing else states).unflatten(-1, (-1, group))
