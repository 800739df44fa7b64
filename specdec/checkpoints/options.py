"""Options of a head, with every fact in them that a layout has to write down."""

from dataclasses import fields
from typing import Any

BACKBONE = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size"),
    "rope_parameters",
)
_BIASES = ("attention_bias", "mlp_bias")
# What `specdec.drafters.{kind}.build` takes for options that are not given.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "medusa": {"num_heads": 4, "num_layers": 1, "own_vocab_head": True},
    "eagle": {"bias": True, "qkv_bias": False},
    "eagle3": {
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "own_embedding": False,
    },
}


def resolved_options(head: Any) -> dict[str, Any]:
    """All options of a head, so that `build` makes it again whatever the target's config says.

    A head is often built from a few options, and the rest follows the target. Layouts that stand
    for themselves need the rest too.

    Args:
        head: a `MedusaHeads`, `EagleHead` or `Eagle3Head`.
    """
    config = head.options if hasattr(head, "options") else head.config
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    if "backbone" not in options:
        return options
    backbone = options["backbone"]
    options["backbone"] = {name: getattr(backbone, name) for name in BACKBONE}
    options["backbone"] |= {name: True for name in _BIASES if getattr(backbone, name)}
    options.pop("tap", None)  # EAGLE-1's is always the target's last
    if "taps" in options:
        options["taps"] = list(options["taps"])
    return options


def check_options(options: dict[str, Any], where: str) -> None:
    """Refuse values from which no shapes follow; whether an option exists, `build` knows.

    Raises:
        ValueError: the option and its value.
    """
    backbone = options.get("backbone", {})
    rope = backbone.get("rope_parameters", {}) if isinstance(backbone, dict) else {}
    if not isinstance(backbone, dict) or not isinstance(rope, dict):
        raise ValueError(
            f"{where!r}: the option backbone is {backbone!r} but it and its rope_parameters must "
            "be objects"
        )
    named = options | {f"backbone.{name}": value for name, value in backbone.items()}
    for name, value in named.items():
        short = name.removeprefix("backbone.")
        is_count = short.startswith("num_") or short.endswith("_size") or short == "head_dim"
        if is_count and (type(value) is not int or value < 1):
            raise ValueError(
                f"{where!r}: the option {name} is {value!r} but must be a whole number above 0"
            )
    for name in (n for values in _DEFAULTS.values() for n, v in values.items() if type(v) is bool):
        if not isinstance(options.get(name, False), bool):
            raise ValueError(
                f"{where!r}: the option {name} is {options[name]!r} but must be true or false"
            )
    taps = options.get("taps")
    if "taps" in options and not (
        isinstance(taps, list | tuple) and taps and all(type(t) is int and t >= 0 for t in taps)
    ):
        raise ValueError(f"{where!r}: the option taps is {taps!r} but must be a list of layers")


def filled(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults, as far as these do not depend on the target."""
    known = {**_DEFAULTS[kind], **options}
    backbone = known.get("backbone", {})
    if kind == "eagle3" and "hidden_size" in backbone:
        known.setdefault("target_hidden_size", backbone["hidden_size"])
    if kind == "eagle3" and "vocab_size" in backbone:
        known.setdefault("draft_vocab_size", backbone["vocab_size"])
    return known


def whole_options(kind: str, options: dict[str, Any], layout: str) -> dict[str, Any]:
    """Filled options that leave no fact of the backbone to the target.

    Raises:
        ValueError: a fact is missing, or one is there that no layout but our own can hold.
    """
    known = filled(kind, options)
    backbone = known.get("backbone", {})
    missing = [name for name in BACKBONE if name not in backbone]
    if missing:
        raise ValueError(
            f"the layout {layout!r} states every fact of the head, but its options leave "
            f"{', '.join(missing)} of the backbone to the target; give the target too "
            "(specdec convert --target), or save the head with resolved_options(head)"
        )
    extra = sorted(set(backbone) - set(BACKBONE))
    if extra:
        raise ValueError(
            f"the layout {layout!r} cannot hold the option backbone.{extra[0]}; use the layout "
            "'specdec', or train a head without it"
        )
    return known
