"""Offline acceptance: how far a head's chain would be accepted, measured without decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.training import TrainingBatch, shifted


@dataclass(frozen=True)
class OfflineAcceptance:
    """Expected greedy acceptance of a chain, from texts that the target wrote.

    Every answer token that has another one behind it is taken as a root, and the head drafts a
    chain behind it: at depth d it is given the text's own tokens and, above depth 1, its own
    outputs. Depth d *matches* if the head's argmax is the target's argmax after the true prefix,
    the answer still goes on there, and every depth above matches too.

    Sums, so that two of them can be added.

    Attributes:
        num_roots: answer tokens that a chain was drafted behind.
        tested: per depth, chains that matched above and whose answer goes on.
        matched: per depth, chains that matched.
    """

    num_roots: int
    tested: tuple[int, ...]
    matched: tuple[int, ...]

    @classmethod
    def from_counts(cls, counts: Tensor) -> "OfflineAcceptance":
        """Counts [1 + 2 D] int64 as `count_matches` gives them, or sums of such."""
        num_roots, *rest = [int(count) for count in counts.tolist()]
        depth = len(rest) // 2
        return cls(num_roots, tuple(rest[:depth]), tuple(rest[depth:]))

    @property
    def accepted_length(self) -> float:
        """Tau: 1 + the mean over roots of the matching depths. 1.0 if there is no root."""
        return 1 + sum(self.matched) / self.num_roots if self.num_roots else 1.0

    @property
    def by_depth(self) -> list[float | None]:
        """Share of the tested chains that match, per depth; None where none was tested."""
        pairs = zip(self.matched, self.tested, strict=True)
        return [matched / tested if tested else None for matched, tested in pairs]


def count_matches(drafted: Tensor, batch: TrainingBatch) -> Tensor:
    """Counts [1 + 2 D] int64: roots, then tested and matched chains of each depth.

    Args:
        drafted: [B, L, D] the first of a trainee's `candidates`.
        batch: see `TrainingBatch`.
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

    Args:
        drafted: [B, L, D, width] candidates, see `Trainee`.
        batch: see `TrainingBatch`.
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

    Args:
        guesses: [places, V] logits of the drafter.
        target_logits: [places, V] of the same tokens.

    Source: Leviathan et al. 2022, arXiv 2211.17192, theorem 3.5.
    """
    same = (guesses.argmax(-1) == target_logits.argmax(-1)).sum()
    mine, its = guesses.float().softmax(-1), target_logits.float().softmax(-1)
    # Rounding may lift the overlap of two equal distributions above 1.
    overlaps = torch.minimum(mine, its).sum(-1).clamp(max=1)
    return torch.stack([same.double(), overlaps.sum(dtype=torch.float64)])
