"""A Llama `config.json`, of transformers 4 or 5, to the options of a head's layer and back."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from specdec.checkpoints.head import Count, HeadCheckpoint
from specdec.common.config import Config, validated
from specdec.registry import head_class

# Facts that every layout but our own must state.
FACTS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size"),
    "rope_parameters",
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
Positive = Annotated[float, Field(gt=0)]


class ForeignConfig(Config):
    """Keys of a `config.json` that are read; null stands for a key that is not there."""

    model_config = ConfigDict(extra="ignore")


class LlamaFacts(ForeignConfig):
    """The layer of a Llama `config.json`.

    The last four have a single value with which our layer computes the same.
    """

    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count | None = None
    hidden_act: str | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: Literal[False] | None = None
    mlp_bias: Literal[False] | None = None
    logit_scale: Annotated[float, Field(ge=1, le=1)] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None


def backbone_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Options of the layer; what the file leaves out is what transformers takes for it.

    Nothing is left to the target, whose own values may be others.
    """
    facts = validated(LlamaFacts, config, repr(where))
    return {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads or facts.num_attention_heads,
        "head_dim": facts.head_dim or facts.hidden_size // facts.num_attention_heads,
        "hidden_act": facts.hidden_act or "silu",
        "rms_norm_eps": facts.rms_norm_eps or 1e-6,
        "max_position_embeddings": facts.max_position_embeddings or 2048,
        "vocab_size": facts.vocab_size,
        "rope_parameters": _rope_of(facts, where),
    }


def _rope_of(facts: LlamaFacts, where: str) -> dict[str, Any]:
    """Rotary parameters as transformers 5 names them, `rope_type` and `rope_theta` always there."""
    new, scaling, theta = facts.rope_parameters, facts.rope_scaling, facts.rope_theta
    found = plain_rope(new or scaling or {}, theta)
    if new and (scaling or theta):
        old = plain_rope(scaling or {}, theta or found["rope_theta"])
        if old != found:
            raise ValueError(
                f"{where!r} contradicts itself: rope_parameters say {found}, rope_theta and "
                f"rope_scaling say {old}; delete the wrong ones"
            )
    if found["rope_type"] not in _ROPE_TYPES or found.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"{where!r} has the rotary parameters {found}, which specdec's heads do not have; "
            f"rope_type must be one of {', '.join(_ROPE_TYPES)}, and all of a head is rotated"
        )
    base = found["rope_theta"]
    if type(base) not in (int, float) or not 0 < base < float("inf"):
        raise ValueError(f"{where!r} has rope_theta {base!r} but must have a number above 0")
    return found | {"rope_theta": float(base)}


def plain_rope(rope: dict[str, Any], theta: float | None = None) -> dict[str, Any]:
    """Rotary parameters without `type`, the old name of `rope_type`, and without nulls."""
    kept = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kept["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    kept["rope_theta"] = rope.get("rope_theta") or theta or 10000.0
    return dict(sorted(kept.items()))


def config_of(backbone: dict[str, Any]) -> dict[str, Any]:
    """Keys of a one-layer Llama `config.json`, its rotary part in both spellings."""
    rope = plain_rope(backbone["rope_parameters"])
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **{name: backbone[name] for name in FACTS},
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }


def whole_options(checkpoint: HeadCheckpoint, layout: str) -> dict[str, Any]:
    """Options with their defaults that leave no fact of the layer to the target."""
    given = head_class(checkpoint.kind).given(checkpoint.options)
    known: dict[str, Any] = given.model_dump(exclude_none=True)
    backbone = known["backbone"]
    if missing := [name for name in FACTS if name not in backbone]:
        raise ValueError(
            f"the layout {layout!r} states every fact of the head, but its options leave "
            f"{', '.join(missing)} of the backbone to the target; give the target too "
            "(specdec convert --target), or save the head with all of head.options"
        )
    if extra := [name for name in sorted(backbone) if backbone[name] and name not in FACTS]:
        raise ValueError(
            f"the layout {layout!r} cannot hold the option backbone.{extra[0]}; use the layout "
            "'specdec', or train a head without it"
        )
    return known
