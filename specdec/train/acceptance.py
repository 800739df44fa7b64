"""Offline acceptance: how far drafts would be accepted, measured on held-out rows, not decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from specdec.data.answers import AnswerRow
from specdec.drafters.training import TrainingBatch, shifted
from specdec.train.heads import Trainee
from specdec.train.results import DomainAcceptance, Evaluation
from specdec.train.sources import Source, seeded


def chain_acceptance(counts: Tensor) -> tuple[float, list[float | None]]:
    """Turn sums of `count_matches` into tau, and the share of tested chains that match, per depth.

    Tau is 1 + the mean over roots of the matching depths, and 1.0 without a root; the share is None
    where no chain was tested.
    """
    num_roots, *rest = counts.tolist()
    tested, matched = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    tau = 1 + sum(matched) / num_roots if num_roots else 1.0
    return tau, [m / t if t else None for m, t in zip(matched, tested, strict=True)]


def count_matches(drafted: Tensor, batch: TrainingBatch) -> Tensor:
    """Count roots, then tested and matched chains of each depth: [1 + 2 D] int64.

    Every answer token that has another one behind it is a root, behind which a chain is drafted
    [B, L, D]: it is given the text's own tokens and, above depth 1, its own outputs. A depth
    matches if the drafted token is the target's argmax after the true prefix, the answer still goes
    on there, and every depth above matches too.
    """
    best = batch.target_logits.argmax(-1)  # [B, L], place i says t_{i+1}
    # A root at i + 1 follows the feature at i.
    alive = shifted(batch.loss_mask, 1)
    tested, matched = [], []
    for level in range(drafted.shape[-1]):
        alive = alive & shifted(batch.loss_mask, 2 + level)
        tested.append(alive.sum())
        alive = alive & (drafted[..., level] == shifted(best, 1 + level))
        matched.append(alive.sum())
    return torch.stack([tested[0], *tested, *matched])


def count_ranks(drafted: Tensor, batch: TrainingBatch) -> Tensor:
    """Counts [D, 1 + width] int64: places tested, and those where the target takes each rank.

    A depth is tested where the target took one of the candidates at every depth above: what
    `best_static_tree` wants to know.
    """
    best = batch.target_logits.argmax(-1)
    alive = shifted(batch.loss_mask, 1)
    counts = []
    for level in range(drafted.shape[2]):
        alive = alive & shifted(batch.loss_mask, 2 + level)
        taken = drafted[:, :, level] == shifted(best, 1 + level).unsqueeze(-1)
        taken = taken & alive.unsqueeze(-1)  # [B, L, width]
        counts.append(torch.cat([alive.sum().view(1), taken.sum((0, 1))]))
        alive = taken.any(-1)
    return torch.stack(counts)


def acceptance_by_rank(counts: Tensor) -> list[list[float]]:
    """The table [depth][rank] of `best_static_tree`, from sums of `count_ranks`."""
    shares = counts[:, 1:] / counts[:, :1].clamp(min=1)
    return [[round(share, 6) for share in row] for row in shares.tolist()]


def drafted_places(batch: TrainingBatch) -> Tensor:
    """Mask [B, L] of the places i where t_{i+1} may be a root and t_{i+2} is the target's too."""
    return shifted(batch.loss_mask, 1) & shifted(batch.loss_mask, 2)


def sum_of_overlaps(guesses: Tensor, target_logits: Tensor) -> Tensor:
    """Alpha's sums [2] in float64, at temperature 0 and at 1, over the places.

    At 0 a place counts 1 if both argmaxes agree; at 1 it counts sum_x min(p(x), q(x)).

    Source: Leviathan et al. 2022, arXiv 2211.17192, theorem 3.5.
    """
    same = (guesses.argmax(-1) == target_logits.argmax(-1)).sum()
    mine, its = guesses.float().softmax(-1), target_logits.float().softmax(-1)
    # Rounding may lift the overlap of two equal distributions above 1.
    overlaps = torch.minimum(mine, its).sum(-1).clamp(max=1)
    return torch.stack([same.double(), overlaps.sum(dtype=torch.float64)])


NUM_RANKS = 10
Sums = dict[str, Tensor]  # of rows, so that those of several domains or processes can be added


def evaluate(
    trainee: Trainee,
    source: Source,
    rows: Sequence[AnswerRow],
    *,
    batch_size: int,
    depth: int,
    seed: int,
    accelerator: Accelerator,
) -> Evaluation:
    """Measure loss and offline acceptance on held-out rows, which the processes share out."""
    depth = trainee.max_depth or depth
    trainee.eval()
    domains: dict[str, list[AnswerRow]] = {}
    for row in rows:
        domains.setdefault(row.domain, []).append(row)
    sums = {
        name: _sums(trainee, source, domains[name], batch_size, depth, seed, accelerator)
        for name in sorted(domains)
    }
    trainee.train()
    names = next(iter(sums.values()))
    total = {name: torch.stack([each[name] for each in sums.values()]).sum(0) for name in names}
    loss, tokens = total["losses"].tolist()
    return Evaluation(
        validation_loss=loss / tokens,
        **_acceptance(total),
        acceptance_by_rank=acceptance_by_rank(total["ranks"]),
        domains={
            name: DomainAcceptance(rows=len(domains[name]), **_acceptance(sums[name]))
            for name in sums
            if name
        },
    )


@torch.no_grad()
def _sums(
    trainee: Trainee,
    source: Source,
    rows: Sequence[AnswerRow],
    batch_size: int,
    depth: int,
    seed: int,
    accelerator: Accelerator,
) -> Sums:
    """Sums over rows, each process having read its share."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    sums = {
        "losses": torch.zeros(2, dtype=torch.float64, device=device),  # loss x tokens, tokens
        "overlaps": torch.zeros(3, dtype=torch.float64, device=device),  # places, sum_of_overlaps
        "matches": torch.zeros(1 + 2 * depth, dtype=torch.long, device=device),
        "ranks": torch.zeros(depth, 1 + NUM_RANKS, dtype=torch.long, device=device),
    }
    # Processes work in step, as sharded weights ask for: one without a batch repeats the first.
    for turn in range(rank, -(-len(batches) // world) * world, world):
        place = turn if turn < len(batches) else 0
        batch = source.batch(batches[place])
        with accelerator.autocast():
            with seeded(device, seed, place):
                loss, _ = trainee(batch)
            mask = drafted_places(batch)
            guessed = trainee.guesses(batch, mask)
            drafted = trainee.candidates(batch, depth, NUM_RANKS)
        if place != turn:
            continue
        tokens = batch.loss_mask.sum()
        overlaps = sum_of_overlaps(guessed, shifted(batch.target_logits, 1)[mask])
        ranks = count_ranks(drafted, batch)  # a small vocabulary has fewer of them
        sums["losses"] += torch.stack([loss * tokens, tokens]).double()
        sums["overlaps"] += torch.cat([mask.sum().double().view(1), overlaps])
        sums["matches"] += count_matches(drafted[..., 0], batch)
        sums["ranks"] += pad(ranks, (0, 1 + NUM_RANKS - ranks.shape[1]))
    return {name: accelerator.reduce(each, "sum") for name, each in sums.items()}


def _acceptance(sums: Sums) -> dict[str, Any]:
    tau, by_depth = chain_acceptance(sums["matches"])
    places, greedy, sampled = sums["overlaps"].tolist()
    alpha = {"0": greedy / places, "1": sampled / places} if places else None
    return {"tau": tau, "acceptance": by_depth, "alpha": alpha}
