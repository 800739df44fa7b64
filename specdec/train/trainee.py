"""What the training loop trains: it asks for a loss and for guesses, and knows no algorithm."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.drafters.training_batch import LossOutput, TrainingBatch


class Trainee(Protocol):
    """A drafter in training.

    Attributes:
        kind: its name in `specdec.registry`.
        module: what is trained; parameters that do not require gradients stay as they are.
        taps: HF `hidden_states` indices that its batches must hold.
        depth: of the chains that it can draft; None for any.
    """

    kind: str
    module: nn.Module
    taps: tuple[int, ...]
    depth: int | None

    def loss(self, batch: TrainingBatch) -> LossOutput:
        """What is minimised, on a batch."""

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """Likeliest ids [B, L, D, width]: at place i for t_{i+2}, t_{i+3}, ..., after the text.

        D is `depth`, or what the drafter has where it is bound to a depth.
        """

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """Logits [places, V] for t_{i+2} at the places i of a mask [B, L].

        Tokens outside a reduced draft vocabulary are -inf.
        """

    def units(self) -> list[nn.Module]:
        """Modules that are sharded each by itself, the largest repeated ones; may be empty."""

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the drafter.

        Args:
            folder: to write to.
            training: what is to be remembered of it.
            weights: trained ones and buffers, whole and on the CPU, where the module's own may be
                spread over processes; names as in its state dict.
        """

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """Let what `export` wrote remember this of its training instead."""

    def drafter(self, folder: Path) -> dict[str, Any]:
        """Options of `load_drafter` for what `export` wrote."""

    def chain(self, depth: int) -> dict[str, Any]:
        """Options of `load_drafter`, beside those of `drafter`, that make it draft chains."""


def trained_dtype(trainee: Trainee) -> torch.dtype:
    """Of the weights that are trained."""
    weights = trainee.module.parameters()
    return next(weight.dtype for weight in weights if weight.requires_grad)


class WithLoss(nn.Module):
    """A trainee's module whose forward is its loss, so that wrappers around it see all of it."""

    def __init__(self, trainee: Trainee) -> None:
        super().__init__()
        self.module = trainee.module
        # A tuple keeps it out of the module's children, which are the trainee's already.
        self._trainee = (trainee,)

    @property
    def trainee(self) -> Trainee:
        """Whose loss it is."""
        return self._trainee[0]

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its graph, and its detached parts."""
        result = self.trainee.loss(batch)
        return result.loss, result.parts
