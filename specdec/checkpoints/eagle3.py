"""Layout "eagle3": EAGLE-3 as SafeAILab published it and vLLM, SGLang and SpecForge read it.

A Llama `config.json` with `draft_vocab_size`, tensors under `midlayer.` or `layers.0.`.

Source: SafeAILab/EAGLE; sgl-project/SpecForge; vLLM and SGLang, `LlamaForCausalLMEagle3`.
"""

from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.backbone_config import backbone_of, config_of
from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import (
    IDS,
    HeadCheckpoint,
    TargetIdentity,
    are_published,
    check_taps,
    check_token_map,
    count,
    flag,
    head_shapes,
    known_sizes,
    section,
    take_tensors,
    taps_of,
    whole_options,
)

NAME, KIND, WEIGHTS = "eagle3", "eagle3", "model.safetensors"
FLAGS = ("norm_before_residual", "norm_before_fc", "norm_output")
# A buffer of the rotary embedding, which older transformers saved; it follows from the config.
_CARRIED = ("midlayer.self_attn.rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq")


def matches(files: RawFiles) -> bool:
    """Whether these are the files of this layout."""
    names = files.tensors
    return "draft_vocab_size" in files.config or any(
        name.startswith("midlayer.") or name.endswith("hidden_norm.weight") for name in names
    )


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head.

    Raises:
        ValueError: see `head_options` and `head_tensors`.
    """
    config, where = files.config, files.config_path
    # SGLang and vLLM look for this flag in both places.
    inner = section(config, "eagle_config", where)
    flags = {name: flag({**config, **inner}, name, False, where) for name in FLAGS}
    if not flag(inner, "use_aux_hidden_state", True, where):
        raise ValueError(
            f"{where!r} has use_aux_hidden_state false: a head on one tap, which specdec does not "
            "have"
        )
    backbone = backbone_of(config, where)
    options = head_options(config, backbone, flags, files)
    tensors = head_tensors(options, files)
    width, vocab_size = options["target_hidden_size"], backbone["vocab_size"]
    return HeadCheckpoint(
        KIND, options, tensors, target=TargetIdentity(None, width, vocab_size), layout=NAME
    )


def head_options(
    config: dict[str, Any], backbone: dict[str, Any], flags: dict[str, bool], files: RawFiles
) -> dict[str, Any]:
    """Options of an EAGLE-3 head from the keys that all its layouts share.

    Raises:
        ValueError: a part that our head does not have, or taps that contradict each other.
    """
    where = files.config_path
    for name in ("fc_norm", "use_aux_norm"):
        if flag(config, name, False, where):
            raise ValueError(
                f"{where!r} has {name} true: EAGLE-3.1's norm of each tap, which "
                "specdec's EAGLE-3 does not have"
            )
    options = {
        "backbone": backbone,
        "target_hidden_size": count(config, "target_hidden_size", where) or backbone["hidden_size"],
        "draft_vocab_size": count(config, "draft_vocab_size", where) or backbone["vocab_size"],
        **flags,
        # A copy of the target's is kept too: only its trainer knows that it is one.
        "own_embedding": "embed_tokens.weight" in files.tensors,
    }
    taps = taps_of(config, where)
    return options if taps is None else {**options, "taps": taps}


def head_tensors(options: dict[str, Any], files: RawFiles) -> dict[str, Tensor]:
    """Tensors of an EAGLE-3 head under our names, from either name of its layer.

    Raises:
        ValueError: a tensor is missing, left over or wrong, or the token maps are.
    """
    prefix = "midlayer." if any(n.startswith("midlayer.") for n in files.tensors) else "layers.0."
    sizes = known_sizes(options)
    is_reduced = sizes["draft_vocab_size"] != sizes["vocab_size"]
    given = _with_whole_maps(files.tensors, sizes["vocab_size"], is_reduced)
    tensors = take_tensors(
        files.weights_path,
        given,
        head_shapes(KIND, options, is_reduced),
        sizes,
        lambda name: name.replace("midlayer.", prefix),
        _CARRIED,
    )
    if is_reduced:
        check_token_map(files.weights_path, tensors["d2t"], tensors["t2d"])
    return tensors


def _with_whole_maps(
    given: dict[str, Tensor], vocab_size: int, is_reduced: bool
) -> dict[str, Tensor]:
    """Both token maps, or none where the vocabularies are one.

    No engine reads `t2d`, so some checkpoints leave it out; others ship maps that change nothing.
    """
    d2t, t2d = given.get("d2t"), given.get("t2d")
    if d2t is None or d2t.dtype not in (torch.int64, torch.int32):
        return given
    if is_reduced:
        ids = (d2t.long() + torch.arange(len(d2t))).clamp(0, vocab_size - 1)
        made = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        return {**given, "d2t": d2t.long(), "t2d": made if t2d is None else t2d}
    dropped = {"d2t"} if not d2t.any() else set()
    if dropped and t2d is not None and t2d.all():
        dropped.add("t2d")
    return {name: tensor for name, tensor in given.items() if name not in dropped}


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a head.

    Raises:
        ValueError: an option that this layout cannot hold.
    """
    options = whole_options(KIND, checkpoint.options, NAME)
    if options["norm_before_residual"]:
        raise ValueError(
            f"the layout {NAME!r} cannot hold norm_before_residual=true, which only vLLM reads "
            "there, so that other engines would draft wrongly; write the layout 'speculators'"
        )
    config = {"architectures": ["LlamaForCausalLMEagle3"], **config_of(options["backbone"])}
    config |= shared_config(options, checkpoint.target, NAME)
    config |= {name: True for name in FLAGS if options[name]}
    config["torch_dtype"] = dtype_name(checkpoint.tensors)
    if IDS in config:
        if are_published(config[IDS], checkpoint.target):
            # Engines find these by themselves, for all targets and without counting differently.
            del config[IDS]
        else:
            ids = [tap - 1 for tap in config[IDS]]
            config["eagle_config"] = {IDS: ids, "use_aux_hidden_state": True}
    return config, checkpoint.tensors


def shared_config(
    options: dict[str, Any], target: TargetIdentity | None, layout: str
) -> dict[str, Any]:
    """Keys that all layouts of EAGLE-3 share, layers counted as vLLM does.

    Raises:
        ValueError: taps that engines cannot capture.
    """
    config = {"draft_vocab_size": options["draft_vocab_size"]}
    if options["target_hidden_size"] != options["backbone"]["hidden_size"]:
        config["target_hidden_size"] = options["target_hidden_size"]
    taps = options.get("taps")
    if taps is not None:
        check_taps(taps, target, layout)
        config[IDS] = taps
    return config


def dtype_name(tensors: dict[str, Tensor]) -> str:
    """The dtype of most of the weights, as configs spell it."""
    dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.ndim == 2]
    return max(set(dtypes), key=dtypes.count)
