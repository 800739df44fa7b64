"""Several drafts as one pool of candidates, equal paths joined."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.verify import Draft


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates from S sources, M in each row; topological.

    Attributes:
        tokens: [B, M] int64.
        parents: [B, M] int64 pool indices, -1 for a child of the root.
        real: [B, M] bool; the others are padding, or stand elsewhere already.
        confidence: [S, B, M] each source's confidence in the path; 0 where it did not draft it.
        depth: at least the longest path.
    """

    tokens: Tensor
    parents: Tensor
    real: Tensor
    confidence: Tensor
    depth: int

    def above(self, values: Tensor, root: float) -> Tensor:
        """Each candidate's parent's value; of [..., B, M], with `root` above the first level."""
        index = (self.parents + 1).expand(values.shape)
        return pad(values, (1, 0), value=root).gather(-1, index)


def merge_drafts(drafts: Sequence[Draft]) -> Pool:
    """Join drafts of chosen tokens for the same rows.

    Args:
        drafts: at least one; each with a confidence, or its nodes count as certain.
    """
    tokens, parents, real = _parts(drafts[0])
    confidences = [_confidence(drafts[0])]
    depth = drafts[0].depth
    for draft in drafts[1:]:
        own_tokens, own_parents, own_real = _parts(draft)
        size = tokens.shape[1]
        place = torch.arange(size, size + draft.num_nodes, device=tokens.device)
        place = place.expand(own_tokens.shape)
        above = torch.where(own_parents < 0, -1, own_parents + size)
        can_match = real.unsqueeze(1) & own_real.unsqueeze(2)
        can_match = can_match & (tokens.unsqueeze(1) == own_tokens.unsqueeze(2))  # [B, n, M]
        # A node stands in the pool if its parent does and a sibling there has its token: after
        # round d that is settled down to depth d.
        for _ in range(min(depth, draft.depth)):
            equal = can_match & (parents.unsqueeze(1) == above.unsqueeze(2))
            is_there, where = equal.max(2)
            place = torch.where(is_there, where, place)
            above = torch.where(own_parents < 0, -1, place.gather(1, own_parents.clamp(min=0)))
        is_new = own_real & (place >= size)
        tokens = torch.cat([tokens, own_tokens], 1)
        parents = torch.cat([parents, above], 1)
        real = torch.cat([real, is_new], 1)
        confidences = [pad(confidence, (0, draft.num_nodes)) for confidence in confidences]
        own = torch.zeros_like(confidences[0])
        confidences.append(own.scatter_add(1, place, _confidence(draft) * own_real))
        depth = max(depth, draft.depth)
    return Pool(tokens, parents, real, torch.stack(confidences), depth)


def _parts(draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
    return draft.tokens, draft.explicit_parents(), draft.real_nodes()


def _confidence(draft: Draft) -> Tensor:
    if draft.confidence is None:
        return torch.ones_like(draft.tokens, dtype=torch.float32)
    return draft.confidence.float() * draft.real_nodes()
