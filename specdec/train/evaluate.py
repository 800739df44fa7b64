"""Validation of a head on rows it was not trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.drafters.training_batch import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.train.acceptance import (
    OfflineAcceptance,
    acceptance_by_rank,
    candidates,
    count_matches,
    count_ranks,
)
from specdec.train.batches import collate
from specdec.train.target_view import view

NUM_RANKS = 10


def evaluate(
    head: Any,
    loss: Callable[[TrainingBatch, int], Tensor],
    target: HFTarget,
    rows: Sequence[AnswerRow],
    *,
    batch_size: int,
    depth: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Mean loss over the answers' tokens, and offline acceptance; the rows are shared out.

    Args:
        head: put into eval mode meanwhile.
        loss: of a batch, given its place among the batches.
        target: frozen.
        rows: at least one.
        batch_size: rows of a batch.
        depth: of the chains whose acceptance is measured.
        accelerator: of this process.

    Returns:
        "validation_loss", "tau" and "acceptance" by depth, see `OfflineAcceptance`, and
        "acceptance_by_rank", see `count_ranks`.
    """
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    dtype = next(head.parameters()).dtype
    # Sums over the rows: loss times tokens, tokens; and counts of matching chains.
    losses = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    counts = torch.zeros(1, dtype=torch.long, device=accelerator.device)
    ranks = torch.zeros(1, 1, dtype=torch.long, device=accelerator.device)
    head.eval()
    for place in range(accelerator.process_index, len(batches), accelerator.num_processes):
        seen = view(target, head.taps, collate(batches[place], accelerator.device), dtype)
        with torch.no_grad(), accelerator.autocast():
            num_tokens = seen.loss_mask.sum()
            losses += torch.stack([loss(seen, place) * num_tokens, num_tokens])
            drafted = candidates(head, seen, depth, NUM_RANKS)
            counts = counts + count_matches(drafted[..., 0], seen)
            ranks = ranks + count_ranks(drafted, seen)
    head.train()
    losses = accelerator.reduce(losses, "sum")
    acceptance = OfflineAcceptance.from_counts(accelerator.reduce(counts, "sum"))
    return {
        "validation_loss": (losses[0] / losses[1]).item(),
        "tau": acceptance.accepted_length,
        "acceptance": acceptance.by_depth,
        "acceptance_by_rank": acceptance_by_rank(accelerator.reduce(ranks, "sum")),
    }
