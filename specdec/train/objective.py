"""What is minimised, with which weights and which noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.heads import head_loss
from specdec.drafters.training_batch import TrainingBatch


class HeadWithLoss(nn.Module):
    """A head whose forward is its loss, so that wrappers around `forward` see all of it."""

    def __init__(self, kind: str, head: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.head, self.options = kind, head, options

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its graph, and its detached parts."""
        result = head_loss(self.kind, self.head, batch, **self.options)
        return result.loss, result.parts


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
