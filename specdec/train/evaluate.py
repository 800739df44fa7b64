"""Validation of a drafter on rows it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.drafters.training import shifted
from specdec.train.acceptance import (
    OfflineAcceptance,
    acceptance_by_rank,
    count_matches,
    count_ranks,
    drafted_places,
    sum_of_overlaps,
)
from specdec.train.data import Source, seeded
from specdec.train.heads import WithLoss

NUM_RANKS = 10


@dataclass
class _Sums:
    """Sums over rows, so that those of several domains or processes can be added."""

    losses: Tensor  # [2] loss times tokens, tokens
    overlaps: Tensor  # [3] places, and the sums of `sum_of_overlaps`
    matches: Tensor  # see `count_matches`
    ranks: Tensor  # see `count_ranks`

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.losses + other.losses,
            self.overlaps + other.overlaps,
            self.matches + other.matches,
            self.ranks + other.ranks,
        )


def evaluate(
    model: WithLoss,
    source: Source,
    rows: Sequence[AnswerRow],
    *,
    batch_size: int,
    depth: int,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Mean loss over the answers' tokens, and offline acceptance; the rows are shared out.

    Args:
        model: not sharded, or whole in each process; put into eval mode meanwhile.
        source: of the batches.
        rows: at least one.
        batch_size: rows of a batch.
        depth: of the chains whose acceptance is measured.
        seed: of the loss's noise.
        accelerator: of this process.

    Returns:
        "validation_loss"; "tau" and "acceptance" by depth, see `OfflineAcceptance`; "alpha" at
        temperatures 0 and 1, see `sum_of_overlaps`; "acceptance_by_rank", see `count_ranks`; and
        "domains", where rows have any: rows, tau and alpha of each.
    """
    # A trainee that is bound to a depth has its own number of levels.
    depth = model.trainee.depth or depth
    model.eval()
    domains = {row.domain for row in rows}
    sums = {
        domain: _reduced(
            _sums(
                model,
                source,
                [row for row in rows if row.domain == domain],
                batch_size,
                depth,
                seed,
                accelerator,
            ),
            accelerator,
        )
        for domain in sorted(domains)
    }
    model.train()
    total = sum(sums.values(), start=_nothing(depth, accelerator.device))
    named = {
        name: {"rows": sum(row.domain == name for row in rows)} | _acceptance(sums[name])
        for name in sums
        if name
    }
    return {
        "validation_loss": (total.losses[0] / total.losses[1]).item(),
        **_acceptance(total),
        "acceptance_by_rank": acceptance_by_rank(total.ranks),
        "domains": named,
    }


def _nothing(depth: int, device: torch.device) -> _Sums:
    return _Sums(
        torch.zeros(2, dtype=torch.float64, device=device),
        torch.zeros(3, dtype=torch.float64, device=device),
        torch.zeros(1 + 2 * depth, dtype=torch.long, device=device),
        torch.zeros(depth, 1 + NUM_RANKS, dtype=torch.long, device=device),
    )


@torch.no_grad()
def _sums(
    model: WithLoss,
    source: Source,
    rows: Sequence[AnswerRow],
    batch_size: int,
    depth: int,
    seed: int,
    accelerator: Accelerator,
) -> _Sums:
    """Over this process's share of the rows."""
    trainee, rank, world = model.trainee, accelerator.process_index, accelerator.num_processes
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    sums = _nothing(depth, accelerator.device)
    # Processes work in step, as sharded weights ask for: one without a batch repeats the first.
    for turn in range(rank, -(-len(batches) // world) * world, world):
        place = turn if turn < len(batches) else 0
        seen = source.batch(batches[place])
        with accelerator.autocast():
            with seeded(accelerator.device, seed, place):
                loss, _ = model(seen)
            mask = drafted_places(seen)
            guessed = trainee.guesses(seen, mask)
            drafted = trainee.candidates(seen, depth, NUM_RANKS)
        if place != turn:
            continue
        num_tokens = seen.loss_mask.sum()
        overlaps = sum_of_overlaps(guessed, shifted(seen.target_logits, 1)[mask])
        ranks = count_ranks(drafted, seen)
        # A small vocabulary has fewer ranks.
        ranks = torch.nn.functional.pad(ranks, (0, 1 + NUM_RANKS - ranks.shape[1]))
        sums += _Sums(
            torch.stack([loss * num_tokens, num_tokens]).double(),
            torch.cat([mask.sum().double().view(1), overlaps]),
            count_matches(drafted[..., 0], seen),
            ranks,
        )
    return sums


def _reduced(sums: _Sums, accelerator: Accelerator) -> _Sums:
    parts = (sums.losses, sums.overlaps, sums.matches, sums.ranks)
    return _Sums(*(accelerator.reduce(part, "sum") for part in parts))


def _acceptance(sums: _Sums) -> dict[str, Any]:
    acceptance = OfflineAcceptance.from_counts(sums.matches)
    places, greedy, sampled = sums.overlaps.tolist()
    return {
        "tau": acceptance.accepted_length,
        "acceptance": acceptance.by_depth,
        "alpha": {"0": greedy / places, "1": sampled / places} if places else None,
    }
