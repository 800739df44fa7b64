"""EAGLE-1: a one-layer head that predicts the target's next feature.

The features are the target's last hidden states, after its final norm, so that the target's own
vocabulary projection reads what the head predicts. Trees: EAGLE-1's static ones or EAGLE-2's.

Source: EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import LlamaConfig

from specdec.drafters.feature_head import (
    DraftAttention,
    FeatureDrafter,
    LlamaMLP,
    LlamaRMSNorm,
    Rotary,
    backbone_config,
)
from specdec.drafters.training import (
    LossOutput,
    TrainingBatch,
    rollout,
    shifted,
    soft_cross_entropy,
)


@dataclass(frozen=True)
class EagleConfig:
    """What makes an EAGLE-1 head.

    Attributes:
        backbone: the decoder layer's config.
        tap: HF `hidden_states` index of the features: the target's last.
        bias: of the fusing layer.
        qkv_bias: of the attention's queries, keys and values.
    """

    backbone: LlamaConfig
    tap: int
    bias: bool = True
    qkv_bias: bool = False


class _Layer(nn.Module):
    """A Llama layer without a norm before its attention: the features are normed already."""

    def __init__(self, config: LlamaConfig, qkv_bias: bool) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config, qkv_bias=qkv_bias)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class EagleHead(nn.Module):
    """The head. Its parameters are named as in the published checkpoints.

    Args:
        config: see `EagleConfig`.
        embedding: the target's input embedding; not a parameter of the head.
        vocab_head: the target's vocabulary projection; not a parameter of the head.
    """

    token_map = None  # it drafts in the target's own vocabulary

    def __init__(self, config: EagleConfig, embedding: nn.Module, vocab_head: nn.Module) -> None:
        super().__init__()
        self.options, self.config, self.taps = config, config.backbone, (config.tap,)
        size = config.backbone.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=config.bias)
        self.layers = nn.ModuleList([_Layer(config.backbone, config.qkv_bias)])
        # A tuple keeps the target's modules out of the head's parameters.
        self._target_parts: tuple[nn.Module, nn.Module] = (embedding, vocab_head)
        self.rotary = Rotary(config.backbone)

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
        attended, _ = layer.self_attn(
            states, self.rotary(states, positions), mask, past_key_values=cache
        )
        states = states + attended
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits [..., V] by the target's own projection."""
        return self._target_parts[1](outputs)

    def carry(self, outputs: Tensor) -> Tensor:
        """The predicted feature itself."""
        return outputs


class EagleDrafter(FeatureDrafter):
    """Drafts trees with an EAGLE-1 head."""

    kind = "eagle"


def build(
    options: dict[str, Any], target_config: Any, embedding: nn.Module, vocab_head: nn.Module
) -> EagleHead:
    """A new head for a target.

    Args:
        options: "bias", "qkv_bias", and "backbone" with fields of `LlamaConfig`.
        target_config: the target's text config.
        embedding: the target's input embedding.
        vocab_head: the target's vocabulary projection.
    """
    options = dict(options)
    backbone = backbone_config(target_config, **options.pop("backbone", {}))
    config = EagleConfig(backbone, tap=target_config.num_hidden_layers, **options)
    return EagleHead(config, embedding, vocab_head)


def loss(
    head: EagleHead, batch: TrainingBatch, noise: float = 0.2, cross_entropy_weight: float = 0.1
) -> LossOutput:
    """Smooth L1 to the target's next feature, and soft cross-entropy to its distribution.

    Args:
        head: in train mode.
        batch: see `TrainingBatch`.
        noise: width of the uniform noise on the features, for texts of 512 tokens; shorter ones
            get more of it, as published.
        cross_entropy_weight: of the second part.
    """
    features = head.fuse(batch.hidden)
    length = features.shape[1]
    scattered = (torch.rand_like(features) - 0.5) * noise * 512 / length
    outputs = next(rollout(head, batch.tokens, features + scattered, 1))
    mask = shifted(batch.loss_mask, 2)
    predicted = outputs[mask]  # [places, H]
    goal = shifted(batch.target_logits, 1)[mask]
    token_part = soft_cross_entropy(head.logits(predicted), goal)
    feature_part = token_part.new_zeros(())
    if len(predicted):
        feature_part = smooth_l1_loss(predicted, shifted(features, 1)[mask])
    return LossOutput(
        feature_part + cross_entropy_weight * token_part,
        {"feature": feature_part.detach(), "cross_entropy_1": token_part.detach()},
    )
