"""Which weights are trained, and with which noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Noise as a function of these numbers alone, so that there is no generator to save."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        torch.manual_seed(seed)
        yield


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
