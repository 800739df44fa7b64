"""A loss or gradients that are not finite: what is said of them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from specdec.data.answers import AnswerRow
from specdec.train.learner import Learner
from specdec.train.objective import seeded
from specdec.train.source import Source

_NAMED_ROWS = 5


def rows_without_loss(
    learner: Learner,
    source: Source,
    rows: Sequence[AnswerRow],
    accelerator: Accelerator,
    seed: Sequence[int],
) -> list[AnswerRow]:
    """The rows whose loss is not finite when each is read alone.

    Every process reads all of them, so that all find the same ones.

    Args:
        learner: all processes call together.
        source: of the batches.
        rows: of one step.
        accelerator: of this process.
        seed: of the noise.
    """
    found = []
    with torch.no_grad(), learner.unsharded():
        for row in rows:
            with seeded(accelerator.device, *seed), accelerator.autocast():
                loss, _ = learner.model(source.batch([row]))
            if not loss.isfinite():
                found.append(row)
    return found


def not_finite(
    step: int,
    loss: float,
    norm: float,
    rows: Sequence[AnswerRow],
    culprits: Sequence[AnswerRow],
    folder: Path,
) -> FloatingPointError:
    """What stops the run.

    Args:
        step: counted from 1.
        loss: of the step.
        norm: of its gradients.
        rows: of the step.
        culprits: those whose own loss is not finite.
        folder: of the run.
    """
    if culprits:
        where = f"the loss of {_named(culprits)} alone is not finite, look at it first"
    elif not math.isfinite(loss):
        where = f"none of its rows alone has such a loss; it read {_named(rows)}"
    else:
        where = f"it read {_named(rows)}"
    return FloatingPointError(
        f"step {step}: the loss is {loss} and its gradients' norm {norm}; both must be finite. "
        f"In this step {where}. The newest checkpoint in {str(folder)!r} is intact; lower lr or "
        "max_grad_norm, or train in float32, into another --out folder"
    )


def _named(rows: Sequence[AnswerRow]) -> str:
    names = ", ".join(repr(row.id) for row in rows[:_NAMED_ROWS])
    more = len(rows) - _NAMED_ROWS
    plural = "s" if len(rows) > 1 else ""
    return f"row{plural} {names}" + (f" and {more} more" if more > 0 else "")
