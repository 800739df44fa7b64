"""Multi-token prediction (MTP): one decoder layer on the target's last state, used recursively.

The state is the target's behind its final norm, where the target's own projection reads it, and so
is what the layer feeds back to itself. Engines keep the keys of the context as the first step made
them, and so does this; training that recomputes the context at every step differs behind it.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2; one layer for all steps: FastMTP, 2509.18362.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from specdec.common.config import Config
from specdec.drafters.feature_head import Backbone, DraftLayer, FeatureDrafter, FeatureHead, norm
from specdec.drafters.training import LossOutput, TrainingBatch, chain_loss
from specdec.drafters.tree_growth import Choices


class MtpOptions(Config):
    """The options of an MTP head."""

    backbone: Backbone = Backbone()


class MtpHead(FeatureHead):
    """The head. Its parameters are named as speculators names them."""

    Options = MtpOptions

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        self.taps = (target_config.num_hidden_layers,)
        layer, size = DraftLayer(self.config, self.config.hidden_size), self.config.hidden_size
        layer.token_layernorm, layer.hidden_layernorm = norm(self.config), norm(self.config)
        layer.input_proj = nn.Linear(2 * size, size, bias=False)
        layer.input_layernorm, layer.final_layernorm = norm(self.config), norm(self.config)
        self.mtp_layers = nn.ModuleList([layer])

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        return hidden[self.taps[0]]

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        layer: Any = self.mtp_layers[0]
        embedded = layer.token_layernorm(self._target_parts[0](tokens))
        states = layer.input_proj(torch.cat([embedded, layer.hidden_layernorm(features)], -1))
        rotary = self.rotary(states, positions)
        return layer.final_layernorm(
            layer(layer.input_layernorm(states), states, rotary, mask, cache)
        )

    def logits(self, outputs: Tensor) -> Tensor:
        return self._target_parts[1](outputs)

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        num_steps: int = 3,
        decay: float = 0.6,
        objective: str = "soft_cross_entropy",
        weighting: str = "decay",
    ) -> LossOutput:
        """An objective of every drafted step; decay as in FastMTP."""
        return chain_loss(self.levels(batch, num_steps, objective), objective, decay, weighting)


class MtpDrafter(FeatureDrafter):
    """Drafts trees with an MTP layer, used once for every level."""

    kind, title, head_class = "mtp", "MTP layer", MtpHead

    @classmethod
    def load(  # type: ignore[override]
        cls,
        target: Any,
        path: str,
        depth: int = 3,
        width: int = 8,
        max_nodes: int = 24,
        choices: Choices | None = None,
        children: str = "top",
        window: int | None = None,
        compile: bool | str | None = None,
        force: bool = False,
    ) -> Self:
        """Load a layer for a target; options from depth to children are those of `TreeShape`.

        Args:
            path: folder or hub id in any known layout; none is embedded.
        """
        shape = depth, width, max_nodes, choices, children
        return super().load(target, path, *shape, window, compile, force)
