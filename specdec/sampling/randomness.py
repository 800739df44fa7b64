"""Random numbers that are a pure function of a row's seed and counter.

A row that draws from shared generator state gets other numbers when the batch around it changes.
Here every number is a hash of (seed, counter, stream, column), so there is no state at all: a row
draws the same numbers alone, in any batch, on any device.

Source: counter-based generators, Salmon et al. 2011 (doi 10.1145/2063384.2063405); the mixer is
SplitMix64, Steele, Lea and Flood 2014 (doi 10.1145/2660193.2660195).
"""

import torch
from torch import Tensor


def _int64(value: int) -> int:
    """Wrap an integer of any size to the signed 64 bits that torch stores."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


# Odd steps far from each other: no two small (seed, counter, stream) triples meet.
_SEED_STEP = _int64(0xD1342543DE82EF95)
_COUNTER_STEP = _int64(0xDB4F0B9175AE2165)
_STREAM_STEP = _int64(0xA0761D6478BD642F)
_COLUMN_STEP = _int64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB))


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    """Shift logically: torch's `>>` copies the sign bit, which would lose information."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Apply SplitMix64's bijective finaliser to int64 `bits`; multiplication wraps."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = _shift_right(bits, shift).bitwise_xor_(bits).mul_(multiplier)
    return _shift_right(bits, 31).bitwise_xor_(bits)


def _row_bits(seeds: Tensor, counters: Tensor, stream: int, size: int) -> Tensor:
    """Hash every (seed, counter, stream, column) to 64 bits, int64 [B, size]."""
    for name, rows in (("seeds", seeds), ("counters", counters)):
        if rows.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {rows.dtype}; call .long()")
    if seeds.dim() != 1 or seeds.shape != counters.shape:
        raise ValueError(
            f"counters has shape {tuple(counters.shape)}, seeds {tuple(seeds.shape)}; give [B]"
        )
    if size < 0:
        raise ValueError(f"size is {size} but must be at least 0: it counts the numbers of a row")
    keys = _mix(seeds * _SEED_STEP + counters * _COUNTER_STEP + _int64(stream * _STREAM_STEP))
    columns = torch.arange(1, size + 1, device=seeds.device).mul_(_COLUMN_STEP)
    return _mix(keys[:, None] + columns)


def row_uniforms(seeds: Tensor, counters: Tensor, stream: int, size: int) -> Tensor:
    """Draw uniform numbers on [0, 1) that depend on nothing but their own row's arguments.

    Args:
        seeds: [B] int64, one per row.
        counters: [B] int64 on the same device; never reuse one for a second draw of the same
            `seeds` and `stream`. The number of committed tokens of the row is a good choice.
        stream: purpose of the draw; different streams are independent.
        size: numbers per row. A longer draw begins with the shorter one.

    Returns:
        [B, size] float32, multiples of 2**-24; the same bits on every device.

    Raises:
        TypeError: seeds or counters are not int64.
        ValueError: their shapes differ, or size is negative.
    """
    bits = _row_bits(seeds, counters, stream, size)
    return _shift_right(bits, 40).to(torch.float32).mul_(2.0**-24)


def row_exponentials(seeds: Tensor, counters: Tensor, stream: int, size: int) -> Tensor:
    """Draw Exp(1) numbers, the noise of `argmax(probs / noise)`; arguments as `row_uniforms`.

    The smallest noise of a row decides the draw. With 24-bit uniforms one in 2**24 would be exactly
    zero and win whatever its probability: at 128,000 tokens that is 0.8 % of all draws. Hence
    53 bits, which needs a float64 logarithm; the result is rounded to float32 afterwards.

    Returns:
        [B, size] float32 in [0, 36.8]. Equal on all devices as far as their float64 `log1p` agree
        after rounding to float32.
    """
    bits = _row_bits(seeds, counters, stream, size)
    negated = _shift_right(bits, 11).to(torch.float64).mul_(-(2.0**-53))
    return negated.log1p_().neg_().to(torch.float32)
