"""Running a feature head on its own outputs over whole texts: the training-time test.

At step k the entry at place i pairs token t_{i+1+k} with the output of step k - 1 at the same
place, stands at rotary position i + k, and sees step 0 up to its own place and every later step at
its own place only. That is what a chain drafted behind entry i sees.

Source: EAGLE-3, arXiv 2503.01840, section 3.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.training_batch import shifted


class StepCache:
    """Keys and values of all steps so far, with their gradients, for layers that expect a cache."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """Add a step's keys and values [B, heads, L, head_dim]; returns those of all steps."""
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)


def step_mask(length: int, step: int, device: torch.device, window: int | None = None) -> Tensor:
    """Who sees whom at a step: bool [1, 1, L, (step + 1) * L].

    A window bounds how many places of step 0 are seen, as in `FeatureDrafter`.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return torch.cat([causal, *[itself] * step], 1)[None, None]


def rollout(
    head: Any, tokens: Tensor, features: Tensor, num_steps: int, window: int | None = None
) -> Iterator[Tensor]:
    """Yield the head's outputs [B, L, F] of each step; step k at place i predicts t_{i+2+k}.

    Args:
        head: a `FeatureHead`.
        tokens: [B, L] int64.
        features: [B, L, F] of the target, fused.
        num_steps: at least 1.
        window: places that the head may look back at; None for all of them.
    """
    length, cache = tokens.shape[1], StepCache()
    places = torch.arange(length, device=tokens.device).expand(tokens.shape)
    for step in range(num_steps):
        mask = step_mask(length, step, tokens.device, window)
        outputs = head(shifted(tokens, 1 + step), features, places + step, mask, cache)
        yield outputs
        features = head.carry(outputs)
