"""P-EAGLE: an EAGLE-3 head that drafts all of its levels in one forward.

Depth 0 is EAGLE-3's first step. Deeper entries hold a mask token and a learned hidden state instead
of what is not known yet; they see the text and their own block, no drafted token. So each level has
one distribution, whatever was drafted above it.

Source: P-EAGLE, arXiv 2602.01469.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from specdec.drafters.eagle3 import Eagle3Head, Eagle3Options
from specdec.drafters.feature_head import FeatureDrafter
from specdec.drafters.heads import Layer
from specdec.drafters.training import LossOutput, TrainingBatch, chain_loss, shifted
from specdec.drafters.tree_growth import Growth

_LEAST_KEPT = 0.2  # share of the places that learn even the deepest level


class PeagleOptions(Eagle3Options):
    """The options of a P-EAGLE head: those of EAGLE-3, the mask and the levels."""

    own_embedding: bool = Field(True, description="its own embedding")
    mask_token_id: Layer | None = None  # None for the last id of the vocabulary
    num_depths: Annotated[int, Field(ge=1, le=64)] = 8


class PeagleHead(Eagle3Head):
    """The head. Its parameters are those of EAGLE-3, and `mask_hidden` [1, 1, taps * H]."""

    Options = PeagleOptions
    is_recursive = False

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        vocab, mask = self.config.vocab_size, self.options.mask_token_id
        mask = vocab - 1 if mask is None else mask
        if mask >= vocab:
            raise ValueError(f"mask_token_id is {mask} but must be below {vocab}, the vocabulary")
        self.options = self.options.model_copy(update={"mask_token_id": mask})
        self.max_depth: int = self.options.num_depths
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features) / 50)

    def masked(self, num_rows: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] and features [B, n, F] of entries below the first."""
        features = self.join(self.mask_hidden.chunk(len(self.taps), -1))
        tokens = torch.full((num_rows, count), self.options.mask_token_id, device=features.device)
        return tokens, features.expand(num_rows, count, -1)

    def rollout(
        self,
        tokens: Tensor,
        features: Tensor,
        num_steps: int,
        window: int | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """All steps in one forward; of step k those at the places `kept[k]` alone, else zeros."""
        (batch, length), device = tokens.shape, tokens.device
        kept = kept or [torch.arange(length, device=device)] * min(num_steps, self.max_depth)
        at = torch.cat([*kept])  # [N] where the chain of each entry begins
        depth = torch.cat([torch.full_like(places, step) for step, places in enumerate(kept)])
        behind = at.unsqueeze(1) - at
        text = (depth == 0) & (behind >= 0) & (behind < (window or length))
        block = (behind == 0) & (depth.unsqueeze(1) >= depth)
        fill, hidden = self.masked(batch, len(at) - length)
        tokens = torch.cat([shifted(tokens, 1), fill], 1)
        features, positions = torch.cat([features, hidden], 1), (at + depth).expand(batch, -1)
        outputs = self(tokens, features, positions, (text | block)[None, None], None)
        for places, part in zip(kept, outputs.split([*map(len, kept)], 1), strict=True):
            yield part.new_zeros(batch, length, part.shape[2]).index_copy(1, places, part)

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        decay: float = 0.8,
        objective: str = "soft_cross_entropy",
        weighting: str = "decay",
        keep: float = 0.7,
    ) -> LossOutput:
        """An objective of every depth d, at a share of the places: keep^d, and 0.2 at least."""
        if not 0 <= keep <= 1:
            raise ValueError(f"loss.keep is {keep} but must be a share, from 0 to 1")
        length = batch.tokens.shape[1]
        # One order for all depths, so that every entry has the ones above it.
        order = torch.randperm(length, device=batch.tokens.device)
        counts = [ceil(max(keep**depth, _LEAST_KEPT) * length) for depth in range(self.max_depth)]
        kept = [order[:count].sort().values for count in counts]
        steps = self.rollout(batch.tokens, self.fuse(batch.hidden), len(kept), None, kept)
        levels = ((outputs, self.logits) for outputs in steps)
        compared = self.compared(batch, objective, levels, kept)
        return chain_loss(compared, objective, decay, weighting)

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        said = super().describe(given)
        said["drafts"] += f"; {self.max_depth} levels in one forward"
        return said


class PeagleDrafter(FeatureDrafter):
    """Drafts trees over what a P-EAGLE head says of each level."""

    kind, title, head_class = "peagle", "P-EAGLE head", PeagleHead
    _below = torch.empty(0)  # [B, levels but the first, D] logits

    def _feed_beam(self, outputs: Tensor, growth: Growth) -> tuple[Tensor, Tensor | None]:
        if growth.level == 1:
            count = growth.num_levels - 1
            levels = torch.arange(count, device=self.device)
            visible = (levels.unsqueeze(1) >= levels).expand(len(outputs), -1, -1)
            tokens, features = self.head.masked(len(outputs), count)
            states, logits = self._feed_open(tokens, features, visible, levels)
            self._below = self.head.logits(states) if logits is None else logits
        return outputs, self._below[:, growth.level - 1 : growth.level]
