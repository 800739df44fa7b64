"""Draft heads in training: Medusa, EAGLE-1 and EAGLE-3."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.checkpoints import (
    HeadCheckpoint,
    TargetIdentity,
    check_target,
    read_head,
    write_head,
)
from specdec.drafters.heads import build_head, fill_head
from specdec.drafters.training import LossOutput, TrainingBatch
from specdec.registry import head_class


class HeadTrainee:
    """A head and its loss.

    Args:
        kind: a strategy with a head.
        head: in float32, on the target's device.
        identity: of the target.
        loss_options: of `specdec.drafters.{kind}.loss`.

    Raises:
        ValueError: an option that the loss does not have, or a tap that the target does not have.
    """

    def __init__(
        self, kind: str, head: Any, identity: TargetIdentity, loss_options: dict[str, Any]
    ) -> None:
        _check_loss_options(kind, loss_options)
        _check_taps(head.taps, identity)
        self.kind, self.module, self.taps = kind, head, tuple(head.taps)
        self.identity, self.loss_options = identity, loss_options
        self.depth = head.max_depth

    def loss(self, batch: TrainingBatch) -> LossOutput:
        """The loss of the head's own file."""
        result: LossOutput = self.module.loss(batch, **self.loss_options)
        return result

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """See `Trainee`. Feature heads are fed the text's tokens and their own outputs."""
        found: Tensor = self.module.candidates(batch, depth, width)
        return found

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """See `Trainee`."""
        found: Tensor = self.module.guesses(batch, mask)
        return found

    def units(self) -> list[nn.Module]:
        """None: a head is one layer."""
        return []

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the head in our own layout."""
        write_head(
            HeadCheckpoint(
                kind=self.kind,
                options=self.module.options.model_dump(exclude_none=True),
                tensors=weights,
                target=self.identity,
                training=training,
            ),
            folder,
        )

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """See `Trainee`."""
        write_head(replace(read_head(folder), training=training), folder)

    def drafter(self, folder: Path) -> dict[str, Any]:
        """See `Trainee`."""
        return {"type": self.kind, "path": str(folder)}

    def chain(self, depth: int) -> dict[str, Any]:
        """A static tree with one node a level."""
        levels = min(depth, self.depth or depth)
        return {"choices": [[0] * (level + 1) for level in range(levels)]}


def new_head(
    kind: str, options: dict[str, Any], init: str | None, target: Any, identity: TargetIdentity
) -> nn.Module:
    """A head to train: new, or as a checkpoint left it.

    Args:
        kind: a strategy with a head.
        options: of a new head's `build`.
        init: folder or hub id of a head for the same target to go on from; it brings its options
            and its draft vocabulary. None for a new one.
        target: what it drafts for.
        identity: of the target.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: options that do not exist, or that contradict `init`; a head of another kind or
            for another target.
    """
    if init is None:
        return build_head(kind, options, target)
    if options:
        raise ValueError(
            f"config drafter.options {sorted(options)} and drafter.init are both given; a head "
            "brings its own options, remove drafter.options (and draft_vocab_size)"
        )
    checkpoint = read_head(init)
    if checkpoint.kind != kind:
        raise ValueError(
            f"config drafter.init {init!r} holds a head of the kind {checkpoint.kind!r}, not "
            f"{kind!r}; set drafter.kind={checkpoint.kind}"
        )
    check_target(checkpoint, identity)
    head = build_head(kind, checkpoint.options, target)
    fill_head(head, checkpoint.tensors, init)
    return head


def _check_taps(taps: Sequence[int], target: TargetIdentity) -> None:
    last = target.num_layers
    for tap in taps:
        if not isinstance(tap, int) or tap < 0 or (last is not None and tap > last):
            raise ValueError(
                f"the head reads hidden_states[{tap}] but the target has only 0 to {last}; set "
                "drafter.options.taps to some of these"
            )


def _check_loss_options(kind: str, options: dict[str, Any]) -> None:
    known = head_class(kind).loss_options()
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"config loss.{unknown} is no option of the {kind} loss; known: {', '.join(known)}"
        )


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
