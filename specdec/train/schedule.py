"""The learning rate of every step."""

import math


def learning_rate(step: int, peak: float, num_warmup: int, num_steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to 0 behind the last step.

    Args:
        step: counted from 0.
        peak: reached by step `num_warmup - 1`, or at once without warm-up.
        num_warmup: steps of warm-up.
        num_steps: of the whole run.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
