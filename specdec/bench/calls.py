"""Decode some prompts with one arm, and keep what can be kept when something goes wrong."""

import time
from collections.abc import Sequence

import torch

from specdec.bench.arms import Arm
from specdec.bench.outcome import Memory, Outcome, Run
from specdec.targets.memory import is_out_of_memory, peak_rss_bytes

# What ends one prompt but not the run: it is counted as failed and never timed.
PROMPT_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError)

Prompts = Sequence[list[int]]


def decode_call(
    arm: Arm, prompts: Prompts, indices: Sequence[int], device: torch.device
) -> Outcome:
    """Decode prompts; those that fail are found, left out, and the others decoded without them.

    Args:
        arm: decodes them.
        prompts: token ids.
        indices: of the prompts in the whole bench, which their seeds follow.
        device: of the target.

    Returns:
        A run or a reason for each prompt.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    rows = _rows(arm, prompts, indices)
    took = time.perf_counter() - started
    wall_s = None if any(isinstance(row, str) for row in rows) else took
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return Outcome(rows, wall_s, Memory(peak_rss_bytes(), peak, arm.cache_bytes))


def _rows(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> list[Run | str]:
    rows, reason, out_of_memory = _try(arm, prompts, indices)
    if rows is not None:
        return list(rows)
    if out_of_memory:
        return [f"{reason}; {_what_fits(arm, prompts, indices)}"] * len(prompts)
    if len(prompts) == 1:
        return [reason]
    alone = [_try(arm, [prompt], [i])[:2] for prompt, i in zip(prompts, indices, strict=True)]
    healthy = [place for place, (found, _) in enumerate(alone) if found is not None]
    if len(healthy) == len(prompts):
        return [reason] * len(prompts)  # only together do they fail
    again = (
        _rows(arm, [prompts[p] for p in healthy], [indices[p] for p in healthy]) if healthy else []
    )
    kept = dict(zip(healthy, again, strict=True))
    return [kept.get(place, why) for place, (_, why) in enumerate(alone)]


def _try(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> tuple[list[Run] | None, str, bool]:
    """The runs, or None with the reason and whether memory ran out."""
    try:
        return arm(prompts, indices), "", False
    except PROMPT_ERRORS as error:
        first_line = (str(error).splitlines() or ["no message"])[0]
        reason, out_of_memory = f"{type(error).__name__}: {first_line}", is_out_of_memory(error)
    # Only here is the error gone, and with it the frames that hold the batch's tensors.
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason, out_of_memory


def _what_fits(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> str:
    """The largest batch that does decode, found by halving, with the longest prompts in it."""
    longest = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    size = len(prompts) // 2
    while size:
        chosen = longest[:size]
        if _try(arm, [prompts[p] for p in chosen], [indices[p] for p in chosen])[0] is not None:
            return f"{size} of these prompts fit together, set batch_size={size}"
        size //= 2
    return "one prompt alone does not fit, lower max_new_tokens or use a smaller target.dtype"
