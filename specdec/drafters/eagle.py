"""EAGLE-1: a one-layer head that predicts the target's next feature.

The features are the target's last hidden states, after its final norm, so that the target's own
vocabulary projection reads what the head predicts. Trees: EAGLE-1's static ones or EAGLE-2's.

Source: EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from specdec.common.config import Config
from specdec.drafters.feature_head import Backbone, DraftLayer, FeatureDrafter, FeatureHead
from specdec.drafters.training import LossOutput, TrainingBatch, shifted
from specdec.drafters.training import objective as objective_of


class EagleOptions(Config):
    """The options of an EAGLE-1 head."""

    backbone: Backbone = Backbone()
    bias: bool = Field(True, description="bias where token and feature are fused")
    qkv_bias: bool = Field(False, description="bias of queries, keys and values")


class EagleHead(FeatureHead):
    """The head. Its parameters are named as in the published checkpoints."""

    Options = EagleOptions
    unread: ClassVar[Mapping[str, str]] = {"vllm": "qkv_bias bias", "sglang": "qkv_bias"}

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        self.taps = (target_config.num_hidden_layers,)
        size = self.config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=self.options.bias)
        # There is no norm before the attention: the features are normed already.
        self.layers = nn.ModuleList([DraftLayer(self.config, size, self.options.qkv_bias)])

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        return hidden[self.taps[0]]

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        embedded = self._target_parts[0](tokens)
        states = self.fc(torch.cat([embedded, features], -1))
        return self.layers[0](states, states, self.rotary(states, positions), mask, cache)

    def logits(self, outputs: Tensor) -> Tensor:
        return self._target_parts[1](outputs)

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        noise: float = 0.2,
        cross_entropy_weight: float = 0.1,
        objective: str = "soft_cross_entropy",
    ) -> LossOutput:
        """Smooth L1 to the target's next feature, and an objective, by the weight of that name.

        `noise` is the width of the uniform noise on the features, for texts of 512 tokens; shorter
        ones get more of it, as published.
        """
        features = self.fuse(batch.hidden)
        scattered = (torch.rand_like(features) - 0.5) * noise * 512 / features.shape[1]
        outputs = next(self.rollout(batch.tokens, features + scattered, 1))
        mask = shifted(batch.loss_mask, 2)
        predicted = outputs[mask]  # [places, H]
        goal, tokens = shifted(batch.target_logits, 1)[mask], shifted(batch.tokens, 2)[mask]
        token_part = objective_of(objective, self.logits(predicted), goal, tokens)
        feature_part = token_part.new_zeros(())
        if len(predicted):
            feature_part = smooth_l1_loss(predicted, shifted(features, 1)[mask])
        return LossOutput(
            feature_part + cross_entropy_weight * token_part,
            {"feature": feature_part.detach(), f"{objective}_1": token_part.detach()},
        )


class EagleDrafter(FeatureDrafter):
    """Drafts trees with an EAGLE-1 head."""

    kind, title, head_class = "eagle", "EAGLE-1 head", EagleHead
    engine_methods: ClassVar[Mapping[str, str]] = {"vllm": "eagle", "sglang": "EAGLE"}
