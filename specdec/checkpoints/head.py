"""A draft head's checkpoint in one form, whatever layout it came from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from specdec.verify.tree import from_choices

KINDS = ("medusa", "eagle", "eagle3")


@dataclass(frozen=True)
class TargetIdentity:
    """What a head remembers of the target that it was trained for.

    Attributes:
        name: hub id, or the last folder of a path; for people. None where the layout has no name.
        hidden_size: H of the target.
        vocab_size: V of the target; None where the layout does not hold it.
        num_layers: decoder layers of the target; None where the layout does not hold it.
        weights: hash of the signs of a few of its weights; None where the layout does not hold
            one, and for targets that are quantised.
        tokenizer: hash of its vocabulary; None where the layout does not hold one, and for
            targets without a tokenizer.
        facts: its text config as far as it changes what is computed, its stop ids
            ("eos_token_ids") and how it is quantised ("quantization"); None where an older specdec
            wrote the identity.
        magnitudes: tensor -> two figures of sampled weights, see `identity.magnitude`; None as for
            `facts`.
    """

    name: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    num_layers: int | None = None
    weights: str | None = None
    tokenizer: str | None = None
    facts: dict[str, Any] | None = None
    magnitudes: dict[str, list[float]] | None = None


@dataclass(frozen=True, eq=False)
class HeadCheckpoint:
    """A head as its drafter builds it.

    Attributes:
        kind: one of `KINDS`.
        options: of `specdec.drafters.{kind}.build`, JSON values only; taps are Hugging Face
            `hidden_states` indices.
        tensors: under the names of that module's `state_dict`.
        tree: choices of a static tree that came with it; None for none.
        target: what it was trained for; None if the layout does not say.
        training: how it was trained (data, tokens seen, seconds, loss, acceptance), JSON values.
        layout: it was read from.
    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    tree: list[list[int]] | None = None
    target: TargetIdentity | None = None
    training: dict[str, Any] = field(default_factory=dict)
    layout: str = "specdec"


def section(config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object inside the config; empty if it is null or not there.

    Raises:
        ValueError: it is something else.
    """
    return _of(config, name, where, dict, "an object") or {}


def flag(config: dict[str, Any], name: str, default: bool, where: str) -> bool:
    """True or false; the default if it is null or not there.

    Raises:
        ValueError: it is something else.
    """
    found = _of(config, name, where, bool, "true or false")
    return default if found is None else bool(found)


def text(config: dict[str, Any], name: str, where: str) -> str | None:
    """A string, or None.

    Raises:
        ValueError: it is something else.
    """
    found: str | None = _of(config, name, where, str, "a string")
    return found


def count(config: dict[str, Any], name: str, where: str) -> int | None:
    """A whole number above 0, or None.

    Raises:
        ValueError: it is something else.
    """
    found: int | None = _of(config, name, where, int, "a whole number above 0")
    if found is not None and (found < 1 or isinstance(found, bool)):
        raise ValueError(f"{where!r} has {name} {found!r}, which must be a whole number above 0")
    return found


def _of(config: dict[str, Any], name: str, where: str, kind: type, words: str) -> Any:
    found = config.get(name)
    if found is not None and not isinstance(found, kind):
        raise ValueError(f"{where!r} has {name} {found!r}, which must be {words}")
    return found


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


IDS = "eagle_aux_hidden_state_layer_ids"


def taps_of(config: dict[str, Any], where: str) -> list[int] | None:
    """Taps that a config names: vLLM's key at the top, SGLang's inside `eagle_config`.

    Returns:
        None where it names none: the taps that EAGLE-3 was published with are meant.

    Raises:
        ValueError: no list of layers, or the two keys do not mean the same.
    """
    inner = section(config, "eagle_config", where).get(IDS)
    top = _checked(config.get(IDS), where)
    nested = _checked(inner, where)
    shifted = None if nested is None else [layer + 1 for layer in nested]
    if top is not None and shifted is not None and top != shifted:
        raise ValueError(
            f"{where!r} contradicts itself: {IDS} is {top} at the top, where vLLM reads it, and "
            f"{nested} in eagle_config, where SGLang reads it and counts from one less; it must be "
            f"{[tap - 1 for tap in top]} there, or be deleted"
        )
    return shifted if top is None else top


def _checked(layers: Any, where: str) -> list[int] | None:
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(each) is int for each in layers) or not layers:
        raise ValueError(f"{where!r}: {IDS} is {layers!r} but must be a list of layers")
    return list(layers)


def check_taps(taps: list[int], target: TargetIdentity | None, layout: str) -> None:
    """Refuse taps that the engines cannot capture.

    Raises:
        ValueError: a layer twice, out of order, or the state behind the target's final norm.
    """
    if sorted(set(taps)) != list(taps):
        raise ValueError(
            f"the layout {layout!r} cannot hold the taps {taps}: engines capture a layer once and "
            "in ascending order; train a head on distinct layers"
        )
    num_layers = target.num_layers if target else None
    if num_layers is not None and taps[-1] >= num_layers:
        raise ValueError(
            f"the layout {layout!r} cannot hold the tap {taps[-1]} of a target with {num_layers} "
            "layers: engines capture before the final norm, hidden_states[-1] is behind it; train "
            f"a head on layers up to {num_layers - 1}"
        )


def are_published(taps: list[int], target: TargetIdentity | None) -> bool:
    """Whether these are the taps that every engine takes when a config names none."""
    num_layers = target.num_layers if target else None
    return num_layers is not None and taps == [2, num_layers // 2, num_layers - 3]


# A dimension is the name of a size, or a multiple of one: "hidden_size", "2*hidden_size".
Shapes = dict[str, tuple[str, ...]]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool,)}
_MOST_BLOCKS = 1000  # of Medusa heads; a number in a config takes no memory
# Why a tensor that is left over is there.
_REASONS = (
    ("fc_norm", "EAGLE-3.1's norm of each tap is not supported"),
    ("aux_norm", "EAGLE-3.1's norm of each tap is not supported"),
    ("q_norm", "layers of Qwen3 are not supported"),
    ("k_norm", "layers of Qwen3 are not supported"),
    ("mask_hidden", "P-EAGLE is not supported"),
    ("_scale", "quantised heads are not supported"),
    ("layers.1.", "heads of several layers are not supported"),
    ("token_map", "Medusa heads with a reduced vocabulary are not supported"),
    ("fc.bias", "is `bias` false in config.json by mistake?"),
)


def head_shapes(kind: str, options: dict[str, Any], is_reduced: bool = False) -> Shapes:
    """Names and shapes of a head's `state_dict`.

    Args:
        kind: of the head.
        options: filled.
        is_reduced: whether an EAGLE-3 head has a draft vocabulary smaller than the target's.
    """
    if kind == "medusa":
        return _medusa_shapes(options)
    backbone = options.get("backbone", {})
    if kind == "eagle":
        layer, width = "layers.0", "hidden_size"
        shapes: Shapes = {"fc.weight": ("hidden_size", "2*hidden_size")}
        if options["bias"]:
            shapes["fc.bias"] = ("hidden_size",)
        norms: tuple[str, ...] = ("post_attention_layernorm",)
    else:
        layer, width, shapes = "midlayer", "2*hidden_size", _eagle3_shapes(options, is_reduced)
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes |= {f"{layer}.{norm}.weight": ("hidden_size",) for norm in norms}
    biases = {"qkv": options.get("qkv_bias", False), "out": backbone.get("attention_bias", False)}
    return shapes | _layer_shapes(layer, width, biases | {"mlp": backbone.get("mlp_bias", False)})


def _layer_shapes(layer: str, width: str, biases: dict[str, bool]) -> Shapes:
    """Attention that reads `width` wide states, and the MLP behind it."""
    rows = {
        "self_attn.q_proj": ("query_size", width, biases["qkv"]),
        "self_attn.k_proj": ("key_size", width, biases["qkv"]),
        "self_attn.v_proj": ("key_size", width, biases["qkv"]),
        "self_attn.o_proj": ("hidden_size", "query_size", biases["out"]),
        "mlp.gate_proj": ("intermediate_size", "hidden_size", biases["mlp"]),
        "mlp.up_proj": ("intermediate_size", "hidden_size", biases["mlp"]),
        "mlp.down_proj": ("hidden_size", "intermediate_size", biases["mlp"]),
    }
    shapes: Shapes = {}
    for name, (outputs, inputs, has_bias) in rows.items():
        shapes[f"{layer}.{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{layer}.{name}.bias"] = (outputs,)
    return shapes


def _eagle3_shapes(options: dict[str, Any], is_reduced: bool) -> Shapes:
    """What surrounds the layer."""
    features = f"{len(options.get('taps') or (0, 0, 0))}*target_hidden_size"
    shapes: Shapes = {"norm.weight": ("hidden_size",), "fc.weight": ("hidden_size", features)}
    if options["norm_before_fc"]:
        shapes["input_norm.weight"] = (features,)
    if options["own_embedding"]:
        shapes["embed_tokens.weight"] = ("vocab_size", "hidden_size")
    shapes["lm_head.weight"] = ("draft_vocab_size", "hidden_size")
    if is_reduced:
        shapes |= {"d2t": ("draft_vocab_size",), "t2d": ("vocab_size",)}
    return shapes


def _medusa_shapes(options: dict[str, Any]) -> Shapes:
    shapes: Shapes = {}
    if options["num_heads"] * options["num_layers"] > _MOST_BLOCKS:
        raise ValueError(
            f"num_heads {options['num_heads']} times num_layers {options['num_layers']} of Medusa "
            f"heads is more than {_MOST_BLOCKS}; is the config damaged?"
        )
    for head in range(options["num_heads"]):
        for layer in range(options["num_layers"]):
            shapes[f"blocks.{head}.{layer}.linear.weight"] = ("hidden_size", "hidden_size")
            shapes[f"blocks.{head}.{layer}.linear.bias"] = ("hidden_size",)
        if options["own_vocab_head"]:
            shapes[f"vocab_heads.{head}.weight"] = ("vocab_size", "hidden_size")
    return shapes


def known_sizes(options: dict[str, Any], target: Any = None) -> dict[str, int]:
    """Sizes that options or the target's identity tell; the rest is read off the tensors."""
    facts = options.get("backbone", options)
    sizes = {
        "hidden_size": facts.get("hidden_size") or getattr(target, "hidden_size", None),
        "vocab_size": facts.get("vocab_size") or getattr(target, "vocab_size", None),
        "intermediate_size": facts.get("intermediate_size"),
        "target_hidden_size": options.get("target_hidden_size")
        or getattr(target, "hidden_size", None),
        "draft_vocab_size": options.get("draft_vocab_size"),
    }
    if facts.get("num_attention_heads") and facts.get("head_dim"):
        sizes["query_size"] = facts["num_attention_heads"] * facts["head_dim"]
        if facts.get("num_key_value_heads"):
            sizes["key_size"] = facts["num_key_value_heads"] * facts["head_dim"]
    return {name: size for name, size in sizes.items() if size is not None}


def take_tensors(
    where: str,
    given: Mapping[str, Tensor],
    shapes: Shapes,
    sizes: dict[str, int],
    name_of: Callable[[str], str] = str,
    carried: Iterable[str] = (),
) -> dict[str, Tensor]:
    """A head's tensors under our names.

    Args:
        where: the file, for messages.
        given: tensors under the layout's names.
        shapes: what must be there, under our names.
        sizes: known ones; others are read off the tensors, and must then agree.
        name_of: the layout's name for one of ours.
        carried: the layout's names of tensors that may be there for nothing.

    Raises:
        ValueError: a tensor is missing, left over, of a wrong shape or dtype, or not finite.
    """
    sizes = dict(sizes)
    names = {name: name_of(name) for name in shapes}
    left = sorted(set(given) - set(names.values()) - set(carried))
    for name, shape in shapes.items():
        if names[name] not in given:
            raise ValueError(_missing(where, names[name], left))
        _check_tensor(where, names[name], given[names[name]], shape, sizes)
    if left:
        reason = next((words for part, words in _REASONS if part in left[0]), "")
        raise ValueError(
            f"{where!r} has {len(left)} tensors that its config does not ask for: "
            f"{', '.join(left[:3])}; {reason or 'the config or the tensors are of another head'}"
        )
    return {name: given[names[name]] for name in shapes}


def _missing(where: str, name: str, left: list[str]) -> str:
    others = f" (it has {', '.join(left[:3])}, which nothing asks for)" if left else ""
    return (
        f"{where!r} lacks the tensor {name}{others}; the checkpoint is incomplete or its config "
        "is of another head, copy or download both again"
    )


def _check_tensor(
    where: str, name: str, tensor: Tensor, shape: tuple[str, ...], sizes: dict[str, int]
) -> None:
    dtypes = _DTYPES.get(name, _FLOATS)
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{where!r}: {name} is of {tensor.dtype} but must be of {' or '.join(map(str, dtypes))}"
        )
    if not _fits(tuple(tensor.shape), shape, sizes):
        wanted = ", ".join(str(_size(each, sizes) or each) for each in shape)
        raise ValueError(
            f"{where!r}: {name} has shape {tuple(tensor.shape)} but must have ({wanted}), that is "
            f"({', '.join(shape)}); the tensor or the config is of another head"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(
            f"{where!r}: {name} holds NaN or infinite values; copy the file again, or train the "
            "head again with a smaller learning rate"
        )


def _fits(shape: tuple[int, ...], wanted: tuple[str, ...], sizes: dict[str, int]) -> bool:
    """Whether the shape is as wanted; sizes that were not known are now."""
    if len(shape) != len(wanted):
        return False
    for found, dimension in zip(shape, wanted, strict=True):
        factor, name = _parts(dimension)
        sizes.setdefault(name, found // factor)
        if found != factor * sizes[name]:
            return False
    return True


def _size(dimension: str, sizes: dict[str, int]) -> int | None:
    factor, name = _parts(dimension)
    return factor * sizes[name] if name in sizes else None


def _parts(dimension: str) -> tuple[int, str]:
    factor, star, name = dimension.partition("*")
    return (int(factor), name) if star else (1, dimension)


def check_checkpoint(checkpoint: HeadCheckpoint, where: str) -> None:
    """Refuse a head whose tensors are not those that its options ask for.

    Raises:
        ValueError: see `take_tensors` and `check_token_map`.
    """
    check_options(checkpoint.options, where)
    options = filled(checkpoint.kind, checkpoint.options)
    sizes = known_sizes(options, checkpoint.target)
    is_reduced = "draft_vocab_size" in options and (
        options["draft_vocab_size"] != sizes["vocab_size"]
        if "vocab_size" in sizes
        else "d2t" in checkpoint.tensors
    )
    shapes = head_shapes(checkpoint.kind, options, is_reduced)
    take_tensors(where, checkpoint.tensors, shapes, sizes)
    if is_reduced:
        check_token_map(where, checkpoint.tensors["d2t"], checkpoint.tensors["t2d"])


def check_token_map(where: str, d2t: Tensor, t2d: Tensor) -> None:
    """Refuse a draft vocabulary whose two maps do not say the same.

    Args:
        where: the file, for messages.
        d2t: [D] offsets: draft id i is target id i + d2t[i].
        t2d: [V] bool, the target ids that the draft vocabulary has.

    Raises:
        ValueError: an id outside the target's vocabulary, one that is there twice, or `t2d` marks
            others.
    """
    ids = d2t.long().cpu() + torch.arange(len(d2t))
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(t2d):
        raise ValueError(
            f"{where!r}: d2t leads to the target ids {int(ids.min())} to {int(ids.max())}, but "
            f"there are {len(t2d)}; d2t must hold offsets, target id minus draft id"
        )
    marked = torch.zeros(len(t2d), dtype=torch.bool)
    marked[ids] = True
    if int(marked.sum()) != len(ids):
        raise ValueError(f"{where!r}: d2t leads to a target id twice; copy the file again")
    if not torch.equal(marked, t2d.cpu()):
        raise ValueError(
            f"{where!r}: t2d marks other target ids than d2t leads to; copy the file again"
        )


def check_tree(tree: Any, where: str) -> None:
    """Refuse what is no tree.

    Args:
        tree: one list of ranks for each node, or None.
        where: the file, for messages.

    Raises:
        ValueError: it is no list of such lists, or a node is there twice or without its parent.
    """
    if tree is None:
        return
    is_list = isinstance(tree, list) and all(isinstance(node, list) for node in tree)
    if not is_list or not all(type(rank) is int for node in tree for rank in node):
        raise ValueError(
            f"{where!r}: the tree is {str(tree)[:60]} but must be a list with one list of ranks "
            "for each node, as [[0], [1], [0, 0]]"
        )
    try:
        from_choices(tree)
    except ValueError as error:
        raise ValueError(f"{where!r}: no tree ({error})") from error
