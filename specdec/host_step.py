"""What the host learns of a step, in one synchronisation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.verify import Draft, Verdict
from specdec.verify.tree import node_depths


@dataclass(frozen=True)
class HostStep:
    """The values of a step that the host needs, one entry a row.

    Attributes:
        tokens: that the verdict adds; none in a row that is not finite.
        num_accepted: draft tokens of them.
        num_drafted: nodes of the draft.
        depth_tested: levels that were judged.
        is_finite: whether all logits that were looked at are numbers.
    """

    tokens: list[list[int]]
    num_accepted: list[int]
    num_drafted: list[int]
    depth_tested: list[int]
    is_finite: list[bool]

    @classmethod
    def fetch(cls, packed: Tensor) -> "HostStep":
        """Bring what `pack` made to the host: the one synchronisation of a step."""
        values = packed.tolist()
        return cls(
            tokens=[row[4 : 5 + row[0]] if row[3] else [] for row in values],
            num_accepted=[row[0] for row in values],
            num_drafted=[row[1] for row in values],
            depth_tested=[row[2] for row in values],
            is_finite=[bool(row[3]) for row in values],
        )


def pack(verdict: Verdict, draft: Draft, healthy: Tensor) -> Tensor:
    """What the host needs of a step, [B, 4 + D + 1]: three counts, health [B], and the tokens."""
    if draft.parents is None or not draft.num_nodes:
        depth_tested = verdict.tested.sum(1)
    else:
        depths = node_depths(draft.parents, draft.depth)
        depth_tested = (depths * verdict.tested).amax(1)
    counts = [verdict.num_accepted, draft.lengths, depth_tested, healthy]
    return torch.cat([torch.stack(counts, 1), verdict.tokens], 1)
