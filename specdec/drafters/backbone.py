"""The one decoder layer that EAGLE heads are made of, from transformers' own Llama parts."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from specdec.targets.attention import NAME as ATTENTION

_SHARED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "max_position_embeddings", "vocab_size"),
)


def backbone_config(target_config: Any, **changes: Any) -> LlamaConfig:
    """A one-layer Llama config as wide as the target, with the target's rotary scaling.

    Args:
        target_config: the target's text config.
        changes: fields of `LlamaConfig` to set otherwise.

    Raises:
        ValueError: a change of no field, or one that contradicts the others.
    """
    unknown = sorted(set(changes) - set(LlamaConfig().to_dict()))
    if unknown:
        # LlamaConfig takes any name; a theta beside the target's parameters would do nothing.
        raise ValueError(
            f"backbone has {unknown[0]!r}, which is no field of LlamaConfig; check the spelling "
            "(rotary settings are one field, rope_parameters)"
        )
    fields: dict[str, Any] = {name: getattr(target_config, name, None) for name in _SHARED}
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["head_dim"] = getattr(target_config, "head_dim", None)
    fields = {name: value for name, value in fields.items() if value is not None}
    rope = _rope_parameters(target_config)
    if rope is not None:
        fields["rope_parameters"] = rope
    try:
        return LlamaConfig(**{**fields, "num_hidden_layers": 1, "hidden_act": "silu", **changes})
    except StrictDataclassError as error:
        reason = error.__cause__ or error
        raise ValueError(f"the head cannot use its options, backbone: {reason}") from error


def _rope_parameters(config: Any) -> dict[str, Any] | None:
    """The target's rotary parameters; of several kinds of layers, those of full attention."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
    # Heads rotate all of each head, whatever share of it the target rotates.
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


class DraftAttention(LlamaAttention):
    """Llama attention whose queries, keys and values may read a wider input than it writes.

    Args:
        config: of the backbone.
        input_size: width of the input; None for the hidden size.
        qkv_bias: give queries, keys and values a bias.
    """

    def __init__(
        self, config: LlamaConfig, input_size: int | None = None, qkv_bias: bool = False
    ) -> None:
        config._attn_implementation = ATTENTION
        super().__init__(config, layer_idx=0)
        width = input_size or config.hidden_size
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self, name).out_features
            setattr(self, name, nn.Linear(width, size, bias=qkv_bias))


class Rotary(LlamaRotaryEmbedding):
    """Llama's rotary embedding, whose frequencies are no parameters and never saved."""


__all__ = ["DraftAttention", "LlamaMLP", "LlamaRMSNorm", "Rotary", "backbone_config"]
