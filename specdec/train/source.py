"""Where a training batch comes from: the target beside the drafter, or a store of features."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from specdec.data.answers import AnswerRow
from specdec.drafters.training_batch import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.train.batches import Layout, TokenBatch, collate, padded

Lay = Callable[[Sequence[int]], Layout]


class Source(Protocol):
    """Turns rows into what a drafter is trained on."""

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """The rows and the target's view of them.

        Args:
            rows: of the split that this source is for.
            lay: where to put texts of given lengths.
        """


class OnlineSource:
    """Runs the target on every batch.

    Args:
        target: in eval mode.
        taps: HF `hidden_states` indices to keep.
        dtype: of what is returned, the drafter's.
    """

    def __init__(self, target: HFTarget, taps: tuple[int, ...], dtype: torch.dtype) -> None:
        self.target, self.taps, self.dtype = target, taps, dtype

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """See `Source`."""
        layout = lay([len(row.tokens) for row in rows])
        return view(self.target, self.taps, collate(rows, self.target.device, layout), self.dtype)


def view(
    target: HFTarget, taps: tuple[int, ...], batch: TokenBatch, dtype: torch.dtype
) -> TrainingBatch:
    """Run the target once over whole texts, without a cache and without gradients.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from, and transformers tells packed texts apart by their positions. Of the hidden states only
    the taps outlive the call.

    Args:
        target: in eval mode.
        taps: HF `hidden_states` indices; the last one is after the final norm, as the vocabulary
            projection reads it.
        batch: on the target's device.
        dtype: of what is returned, the drafter's.
    """
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    with torch.no_grad():
        out = target.model(
            input_ids=batch.tokens, output_hidden_states=bool(taps), use_cache=False, **positions
        )
    return TrainingBatch(
        tokens=batch.tokens,
        loss_mask=batch.loss_mask,
        hidden={tap: out.hidden_states[tap].to(dtype) for tap in taps},
        target_logits=out.logits.to(dtype),
        positions=batch.positions,
    )
