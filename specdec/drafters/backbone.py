"""The one Llama layer of feature heads: its options, and what they take over from the target."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import field_validator
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
)

from specdec.common.config import Config
from specdec.drafters.heads import Size
from specdec.targets.attention import NAME as ATTENTION

_SHARED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size"),
)


class Backbone(Config):
    """Fields of `LlamaConfig` that a head may set otherwise than its target; None follows it."""

    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str | None = None
    rms_norm_eps: float | None = None
    max_position_embeddings: Size | None = None
    vocab_size: Size | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    attention_dropout: float | None = None

    @field_validator("hidden_act")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in ACT2FN:
            raise ValueError("must be an activation that transformers has, such as silu")
        return name

    def for_target(self, target_config: Any) -> LlamaConfig:
        """A one-layer config as wide as the target, with the target's rotary scaling.

        Raises:
            ValueError: fields that contradict each other.
        """
        fields: dict[str, Any] = {name: getattr(target_config, name, None) for name in _SHARED}
        fields["intermediate_size"] = fields["intermediate_size"] or 4 * fields["hidden_size"]
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields |= {"rope_parameters": _rope_parameters(target_config), "hidden_act": "silu"}
        fields |= self.model_dump(exclude_none=True)
        known = {name: value for name, value in fields.items() if value is not None}
        try:
            return LlamaConfig(**known, num_hidden_layers=1)
        except StrictDataclassError as error:
            reason = error.__cause__ or error
            raise ValueError(f"the head cannot use its options, backbone: {reason}") from error

    @classmethod
    def of(cls, config: LlamaConfig) -> "Backbone":
        """All fields of a config; biases and dropout only where it has them."""
        fields = {name: getattr(config, name) for name in cls.model_fields}
        optional = ("attention_bias", "mlp_bias", "attention_dropout")
        return cls(**{name: v for name, v in fields.items() if v or name not in optional})


def _rope_parameters(config: Any) -> dict[str, Any] | None:
    """The target's rotary parameters; of several kinds of layers, those of full attention."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    rope = rope.get("full_attention", rope)
    # Heads rotate all of each head, whatever share of it the target rotates.
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


class DraftLayer(nn.Module):
    """A Llama layer whose attention may read a wider input than it writes, normed by its caller."""

    def __init__(self, config: LlamaConfig, input_size: int, qkv_bias: bool = False) -> None:
        super().__init__()
        config._attn_implementation = ATTENTION
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(input_size, size, bias=qkv_bias))
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = norm(config)

    def forward(
        self, states: Tensor, residual: Tensor, rotary: Any, mask: Any, cache: Any
    ) -> Tensor:
        """States [B, n, W] and residual [B, n, H] to [B, n, H]."""
        # By place, because transformers changed the name of the cache.
        states = residual + self.self_attn(states, rotary, mask, cache)[0]
        return states + self.mlp(self.post_attention_layernorm(states))


def norm(config: LlamaConfig, size: int | None = None) -> LlamaRMSNorm:
    """An RMS norm of the layer's width, or another one."""
    return LlamaRMSNorm(size or config.hidden_size, config.rms_norm_eps)
