"""What a drafter's confidence is worth, learned from what was accepted."""

import torch
from torch import Tensor

NUM_BINS = 10
# The confidence itself counts as much as this many observations.
PRIOR_WEIGHT = 10.0


class Calibration:
    """Acceptance by source and confidence, as counts.

    A node's confidence here is the conditional one: that it is the child the target takes, given
    that its parent was taken.

    Args:
        num_sources: S.
        device: of the counts.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        centres = (torch.arange(NUM_BINS, device=device) + 0.5) / NUM_BINS
        self._shown = torch.full((num_sources, NUM_BINS), PRIOR_WEIGHT, device=device)
        self._taken = PRIOR_WEIGHT * centres.expand(num_sources, -1)
        self._first = NUM_BINS * torch.arange(num_sources, device=device)

    def _bins(self, confidence: Tensor) -> Tensor:
        """Flat index of each source's [S, ...] confidences in the counts."""
        bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        return bins + self._first.view(-1, *[1] * (confidence.dim() - 1))

    def acceptance(self, confidence: Tensor) -> Tensor:
        """Estimated acceptance [S, ...] of nodes with these conditional confidences [S, ...]."""
        return (self._taken / self._shown).flatten()[self._bins(confidence)]

    def add(self, confidence: Tensor, counted: Tensor, taken: Tensor) -> None:
        """Learn from judged nodes.

        Args:
            confidence: [S, ...] conditional confidences.
            counted: [S, ...] bool, nodes that the source drafted and whose parent was taken.
            taken: [...] bool, nodes on the accepted path.
        """
        bins = self._bins(confidence).flatten()
        shown = counted.flatten().to(self._shown.dtype)
        accepted = (counted & taken).flatten().to(shown.dtype)
        self._shown = self._shown.flatten().index_add(0, bins, shown).view_as(self._shown)
        self._taken = self._taken.flatten().index_add(0, bins, accepted).view_as(self._taken)
