"""The target beside the head: what it makes of a batch of texts."""

import torch

from specdec.drafters.training_batch import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.train.batches import TokenBatch


def view(
    target: HFTarget, taps: tuple[int, ...], batch: TokenBatch, dtype: torch.dtype
) -> TrainingBatch:
    """Run the target once over whole texts, without a cache and without gradients.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from. Of the hidden states only the taps outlive the call.

    Args:
        target: in eval mode.
        taps: HF `hidden_states` indices; the last one is after the final norm, as the vocabulary
            projection reads it.
        batch: on the target's device.
        dtype: of what is returned, the head's.
    """
    with torch.no_grad():
        out = target.model(input_ids=batch.tokens, output_hidden_states=bool(taps), use_cache=False)
    return TrainingBatch(
        tokens=batch.tokens,
        loss_mask=batch.loss_mask,
        hidden={tap: out.hidden_states[tap].to(dtype) for tap in taps},
        target_logits=out.logits.to(dtype),
    )
