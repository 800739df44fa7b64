"""The tensors that a head must have: all of them, no others, each of its shape."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.head import HeadCheckpoint
from specdec.checkpoints.options import check_options, filled

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
