"""Drafters in training, and the heads among them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.checkpoints import (
    HeadCheckpoint,
    TargetIdentity,
    check_target,
    read_head,
    write_head,
)
from specdec.drafters.heads import Head, build_head, fill_head
from specdec.drafters.training import TrainingBatch


class Trainee(nn.Module):
    """A drafter in training, whose forward is its loss, so that wrappers around it see all of it.

    Attributes:
        taps: HF `hidden_states` indices that its batches must hold.
        max_depth: levels of the chains that it can draft; None for any.
    """

    taps: tuple[int, ...] = ()
    max_depth: int | None = None

    def __init__(self, kind: str, module: nn.Module, loss_options: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.module, self.loss_options = kind, module, loss_options

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with its graph, and its detached parts."""
        raise NotImplementedError

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the module."""
        return {n: w for n, w in self.module.named_parameters() if w.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trained weights."""
        return next(iter(self.trained.values())).dtype

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """Return likeliest ids [B, L, D, width]: at place i for t_{i+2}, t_{i+3}, ...

        D is `depth`, or what the drafter has where it is bound to a depth.
        """
        raise NotImplementedError

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """Return logits [places, V] for t_{i+2} at the places i of a mask [B, L].

        Tokens outside a reduced draft vocabulary are -inf.
        """
        raise NotImplementedError

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the drafter; `weights` are whole, where the module's own may be spread out."""
        raise NotImplementedError

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """Let what `export` wrote remember this of its training instead."""
        raise NotImplementedError

    def drafter(self, folder: Path) -> dict[str, Any]:
        """Return options of `load_drafter` for what `export` wrote."""
        return {"type": self.kind, "path": str(folder)}

    def chain(self, depth: int) -> dict[str, Any]:
        """Return further options of `load_drafter`, that make it draft chains."""
        raise NotImplementedError


class HeadTrainee(Trainee):
    """A head and its loss."""

    module: Head

    def __init__(
        self, kind: str, head: Head, identity: TargetIdentity, loss_options: Mapping[str, Any]
    ) -> None:
        check_options(kind, head.loss_options(), loss_options)
        last = identity.num_layers
        for tap in head.taps:
            if not isinstance(tap, int) or tap < 0 or (last is not None and tap > last):
                raise ValueError(
                    f"the head reads hidden_states[{tap}] but the target has only 0 to {last}; set "
                    "drafter.options.taps to some of these"
                )
        super().__init__(kind, head, loss_options)
        self.taps, self.max_depth, self.identity = tuple(head.taps), head.max_depth, identity

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Trainee`."""
        result = self.module.loss(batch, **self.loss_options)
        return result.loss, result.parts

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """See `Trainee`."""
        return self.module.candidates(batch, depth, width)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """See `Trainee`."""
        return self.module.guesses(batch, mask)

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the head in our own layout."""
        options = self.module.options.model_dump(exclude_none=True)
        head = HeadCheckpoint(
            kind=self.kind,
            options=options,
            tensors=weights,
            target=self.identity,
            training=training,
        )
        write_head(head, folder)

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """See `Trainee`."""
        write_head(replace(read_head(folder), training=training), folder)

    def chain(self, depth: int) -> dict[str, Any]:
        """Return a static tree with one node a level."""
        levels = min(depth, self.max_depth or depth)
        return {"choices": [[0] * (level + 1) for level in range(levels)]}


def new_head(
    kind: str, options: dict[str, Any], init: str | None, target: Any, identity: TargetIdentity
) -> Head:
    """Build a head to train: new, or as a checkpoint left it."""
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


def check_options(kind: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse an option that a loss does not have."""
    for name in given:
        if name not in known:
            raise ValueError(
                f"config loss.{name} is no option of the {kind} loss; known: {', '.join(known)}"
            )
