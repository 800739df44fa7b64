"""Growing a deterministic draft tree level by level (EAGLE-2, arXiv 2406.16858)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.verify import Draft, best_first


class CandidatePool:
    """Every candidate seen while a tree grows, and the beam that is expanded next.

    Args:
        width: children taken per node, and nodes expanded per level.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self.origin = torch.empty(0)  # [B, beam] parents of the newest beam in the beam before
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []  # pool indices
        self._scores: list[Tensor] = []
        self._beams: list[tuple[Tensor, Tensor]] = []  # tokens, parents among expanded nodes
        self._visible: Tensor | None = None  # [B, beam, expanded] ancestors of the newest beam
        self._beam_pool: Tensor | None = None  # [B, beam] pool indices of the newest beam
        self._beam_scores: Tensor | None = None

    @property
    def beam_size(self) -> int:
        """Nodes of the newest beam."""
        return self._beams[-1][0].shape[1]

    @property
    def newest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The newest beam, to be fed to a model.

        Returns:
            tokens [B, beam]; which of the S expanded nodes each of them sees, bool [B, beam, S],
            the beam itself last; and the levels [S] of these nodes, 0 for the root's children.
        """
        assert self._visible is not None
        sizes = [tokens.shape[1] for tokens, _ in self._beams]
        levels = [level for level, size in enumerate(sizes) for _ in range(size)]
        tokens = self._beams[-1][0]
        return tokens, self._visible, torch.tensor(levels, device=tokens.device)

    def _extend_visible(self, origin: Tensor) -> Tensor:
        """What the next beam sees: what its parents saw, and each node itself."""
        batch, beam = origin.shape
        itself = torch.eye(beam, dtype=torch.bool, device=origin.device).expand(batch, -1, -1)
        if self._visible is None:
            return itself
        index = origin.unsqueeze(2).expand(-1, -1, self._visible.shape[2])
        return torch.cat([self._visible.gather(1, index), itself], 2)

    def add_level(
        self, log_probs: Tensor, ids: Tensor | None = None, *, is_last: bool = False
    ) -> None:
        """Add the top children of the newest beam, from its log-probabilities [B, beam, V].

        `ids` [V] names the tokens that the columns stand for, None if they are token ids. The last
        level has no beam.
        """
        top = log_probs.topk(min(self._width, log_probs.shape[-1]), -1)
        batch, beam, width = top.indices.shape
        above = top.values.new_zeros(batch, 1) if self._beam_scores is None else self._beam_scores
        scores = (above.unsqueeze(2) + top.values).flatten(1)  # [B, beam * width]
        tokens = (top.indices if ids is None else ids[top.indices]).flatten(1)
        if self._beam_pool is None:
            parents = torch.full_like(tokens, -1)
        else:
            parents = self._beam_pool.repeat_interleave(width, 1)
        first = sum(part.shape[1] for part in self._tokens)
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._scores.append(scores)
        if is_last:
            return
        best = scores.topk(min(self._width, scores.shape[1]), 1)
        expanded_before = sum(part.shape[1] for part, _ in self._beams)
        beam_parents = torch.full_like(best.indices, -1)
        self.origin = best.indices // width
        if self._beams:
            beam_parents = expanded_before - beam + self.origin
        self._visible = self._extend_visible(self.origin)
        self._beams.append((tokens.gather(1, best.indices), beam_parents))
        self._beam_pool, self._beam_scores = best.indices + first, best.values

    def expanded(self) -> Draft:
        """The nodes of all beams so far, as a draft to score."""
        tokens = torch.cat([part for part, _ in self._beams], 1)
        parents = torch.cat([part for _, part in self._beams], 1)
        return Draft.tree(tokens, parents, depth=len(self._beams))

    def best(self, max_nodes: int, budget: Sequence[int]) -> Draft:
        """Rerank the whole pool to the node budget, and row b to `budget[b]` nodes."""
        parents, scores = torch.cat(self._parents, 1), torch.cat(self._scores, 1)
        row_budgets = torch.tensor(budget, device=scores.device)
        kept = best_first(scores, parents, min(max_nodes, max(budget)), row_budgets)
        tokens = torch.cat(self._tokens, 1).gather(1, kept.nodes.clamp(min=0))
        tokens = tokens.masked_fill(kept.nodes < 0, -1)
        confidence = scores.gather(1, kept.nodes.clamp(min=0)).exp()
        return Draft.tree(
            tokens, kept.parents, kept.lengths, len(self._tokens), confidence=confidence
        )
