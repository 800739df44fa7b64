"""A Llama `config.json`, of transformers 4 or 5, to a backbone's options and back."""

from typing import Any

from specdec.checkpoints.head import count, section, text

_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
# Facts that change what the layer computes, and the only value for which ours computes the same.
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "logit_scale": 1.0,
    "partial_rotary_factor": 1.0,
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def backbone_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Options of the backbone; what the file leaves out is what transformers takes for it.

    Nothing is left to the target, whose own values may be others.

    Args:
        config: content of a `config.json`.
        where: the file, for messages.

    Raises:
        ValueError: a size is missing or no size, or something that our layer does not have.
    """
    for name in _REQUIRED:
        if config.get(name) is None:
            raise ValueError(f"{where!r} lacks {name}; copy it from the run that made the head")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in (None, neutral):
            raise ValueError(
                f"{where!r} has {name} {config[name]!r}, which specdec's heads do not have; only "
                f"{neutral!r} can be read"
            )
    sizes = {name: count(config, name, where) for name in _SIZES}
    num_heads = config["num_attention_heads"]
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or num_heads
    sizes["head_dim"] = sizes["head_dim"] or config["hidden_size"] // num_heads
    sizes["max_position_embeddings"] = sizes["max_position_embeddings"] or 2048
    return {
        **sizes,
        "hidden_act": text(config, "hidden_act", where) or "silu",
        "rms_norm_eps": _number(config, "rms_norm_eps", where) or 1e-6,
        "rope_parameters": rope_of(config, where),
    }


def config_of(backbone: dict[str, Any]) -> dict[str, Any]:
    """Keys of a one-layer Llama `config.json`, its rotary part in both spellings."""
    rope = _plain(backbone["rope_parameters"])
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **{name: value for name, value in backbone.items() if name != "rope_parameters"},
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }


def rope_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Rotary parameters as transformers 5 names them, `rope_type` and `rope_theta` always there.

    Raises:
        ValueError: both spellings are there and differ, or a kind that our layer does not have.
    """
    new = section(config, "rope_parameters", where)
    scaling, theta = section(config, "rope_scaling", where), _number(config, "rope_theta", where)
    _number(new, "rope_theta", where)
    found = _plain(new or scaling, theta)
    if new and (scaling or theta):
        old = _plain(scaling, theta or found["rope_theta"])
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
    return found


def _number(config: dict[str, Any], name: str, where: str) -> float | None:
    found = config.get(name)
    if found is not None and (type(found) not in (int, float) or not 0 < found < float("inf")):
        raise ValueError(f"{where!r} has {name} {found!r}, which must be a number above 0")
    return found


def _plain(rope: dict[str, Any], theta: float | None = None) -> dict[str, Any]:
    """Without `type`, the old name of `rope_type`, and without nulls."""
    kept = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kept["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    kept["rope_theta"] = float(rope.get("rope_theta") or theta or 10000.0)
    return dict(sorted(kept.items()))
