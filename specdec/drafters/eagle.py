"""EAGLE-1: a one-layer head that predicts the target's next feature.

The features are the target's last hidden states, after its final norm, so that the target's own
vocabulary projection reads what the head predicts. Trees: EAGLE-1's static ones or EAGLE-2's.

Source: EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import LlamaConfig

from specdec.common.config import Config
from specdec.drafters.backbone import (
    Backbone,
    DraftAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from specdec.drafters.feature_head import FeatureDrafter, FeatureHead
from specdec.drafters.training import (
    LossOutput,
    TrainingBatch,
    rollout,
    shifted,
    soft_cross_entropy,
)


class EagleOptions(Config):
    """The options of an EAGLE-1 head."""

    backbone: Backbone = Backbone()
    bias: Annotated[bool, Field(description="bias where token and feature are fused")] = True
    qkv_bias: Annotated[bool, Field(description="bias of queries, keys and values")] = False


class _Layer(nn.Module):
    """A Llama layer without a norm before its attention: the features are normed already."""

    def __init__(self, config: LlamaConfig, qkv_bias: bool) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config, qkv_bias=qkv_bias)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class EagleHead(FeatureHead):
    """The head. Its parameters are named as in the published checkpoints."""

    Options = EagleOptions

    def __init__(
        self,
        options: Mapping[str, Any],
        target_config: Any,
        embedding: nn.Module | None = None,
        vocab_head: nn.Module | None = None,
    ) -> None:
        super().__init__(options, target_config, embedding, vocab_head)
        given = self.given(options)
        self.config = given.backbone.for_target(target_config)
        self.options = given.model_copy(update={"backbone": Backbone.of(self.config)})
        self.taps = (target_config.num_hidden_layers,)
        size = self.config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=given.bias)
        self.layers = nn.ModuleList([_Layer(self.config, given.qkv_bias)])
        self.rotary = LlamaRotaryEmbedding(self.config)

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """The features are the tap itself."""
        return hidden[self.taps[0]]

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Predicted features [B, n, H], see `FeatureHead`."""
        layer: Any = self.layers[0]
        embedded = self._target_parts[0](tokens)
        states = self.fc(torch.cat([embedded, features], -1))
        # By place, because transformers changed the name of the cache.
        attended, _ = layer.self_attn(states, self.rotary(states, positions), mask, cache)
        states = states + attended
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits [..., V] by the target's own projection."""
        return self._target_parts[1](outputs)

    def loss(  # type: ignore[override]
        self, batch: TrainingBatch, noise: float = 0.2, cross_entropy_weight: float = 0.1
    ) -> LossOutput:
        """Smooth L1 to the target's next feature, and soft cross-entropy to its distribution.

        Args:
            batch: see `TrainingBatch`.
            noise: width of the uniform noise on the features, for texts of 512 tokens; shorter
                ones get more of it, as published.
            cross_entropy_weight: of the second part.
        """
        features = self.fuse(batch.hidden)
        length = features.shape[1]
        scattered = (torch.rand_like(features) - 0.5) * noise * 512 / length
        outputs = next(rollout(self, batch.tokens, features + scattered, 1))
        mask = shifted(batch.loss_mask, 2)
        predicted = outputs[mask]  # [places, H]
        goal = shifted(batch.target_logits, 1)[mask]
        token_part = soft_cross_entropy(self.logits(predicted), goal)
        feature_part = token_part.new_zeros(())
        if len(predicted):
            feature_part = smooth_l1_loss(predicted, shifted(features, 1)[mask])
        return LossOutput(
            feature_part + cross_entropy_weight * token_part,
            {"feature": feature_part.detach(), "cross_entropy_1": token_part.detach()},
        )


class EagleDrafter(FeatureDrafter):
    """Drafts trees with an EAGLE-1 head."""

    kind, title, head_class = "eagle", "EAGLE-1 head", EagleHead
