"""Layout "eagle3": EAGLE-3 as SafeAILab published it and vLLM, SGLang and SpecForge read it.

A Llama `config.json` with `draft_vocab_size`, tensors under `midlayer.` or `layers.0.`. Layers are
counted as vLLM does at the top level, which is as we do, and one less inside `eagle_config`, which
is as SGLang does.

Source: SafeAILab/EAGLE; sgl-project/SpecForge; vLLM and SGLang, `LlamaForCausalLMEagle3`.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from specdec.checkpoints.folder import RawFiles, dtype_name
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity, checked
from specdec.checkpoints.llama_config import ForeignConfig, backbone_of, config_of, whole_options
from specdec.common.config import validated

NAME, KIND, WEIGHTS = "eagle3", "eagle3", "model.safetensors"
FLAGS = ("norm_before_residual", "norm_before_fc", "norm_output")
IDS = "eagle_aux_hidden_state_layer_ids"
Layers = Annotated[list[int], Field(min_length=1)]
# A buffer of the rotary embedding, which older transformers saved; it follows from the config.
_CARRIED = ("midlayer.self_attn.rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq")


class Eagle3Keys(ForeignConfig):
    """Keys that all layouts of EAGLE-3 share; EAGLE-3.1's norms of each tap are not supported."""

    target_hidden_size: Count | None = None
    draft_vocab_size: Count | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    norm_output: bool | None = None
    eagle_aux_hidden_state_layer_ids: Layers | None = None
    fc_norm: Literal[False] | None = None
    use_aux_norm: Literal[False] | None = None


class _EngineKeys(ForeignConfig):
    """SGLang's section; a head on one tap (`use_aux_hidden_state` false) is not supported."""

    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    norm_output: bool | None = None
    use_aux_hidden_state: Literal[True] | None = None
    eagle_aux_hidden_state_layer_ids: Layers | None = None


class _Keys(Eagle3Keys):
    eagle_config: _EngineKeys | None = None


def matches(files: RawFiles) -> bool:
    """Tell if these are the files of this layout."""
    names = files.tensors
    return "draft_vocab_size" in files.config or any(
        name.startswith("midlayer.") or name.endswith("hidden_norm.weight") for name in names
    )


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head."""
    where = files.config_path
    keys = validated(_Keys, files.config, repr(where))
    inner = keys.eagle_config or _EngineKeys()
    # SGLang and vLLM look for these flags in both places.
    flags = {name: getattr(inner, name) for name in FLAGS if getattr(inner, name) is not None}
    nested = inner.eagle_aux_hidden_state_layer_ids
    taps = keys.eagle_aux_hidden_state_layer_ids
    shifted = None if nested is None else [layer + 1 for layer in nested]
    if None not in (taps, shifted) and taps != shifted:
        raise ValueError(
            f"{where!r} contradicts itself: {IDS} is {taps} at the top, where vLLM reads it, and "
            f"{nested} in eagle_config, where SGLang reads it and counts from one less; it must be "
            f"{[tap - 1 for tap in taps or []]} there, or be deleted"
        )
    keys = keys.model_copy(update={**flags, IDS: taps or shifted})
    return head_of_keys(keys, backbone_of(files.config, where), files, NAME)


def head_of_keys(
    keys: Eagle3Keys, backbone: dict[str, Any], files: RawFiles, layout: str
) -> HeadCheckpoint:
    """An EAGLE-3 head from the keys that all its layouts share."""
    taps = keys.eagle_aux_hidden_state_layer_ids
    options: dict[str, Any] = {
        "backbone": backbone,
        "target_hidden_size": keys.target_hidden_size or backbone["hidden_size"],
        "draft_vocab_size": keys.draft_vocab_size or backbone["vocab_size"],
        **{name: getattr(keys, name) is True for name in FLAGS},
        # A copy of the target's is kept too: only its trainer knows that it is one.
        "own_embedding": "embed_tokens.weight" in files.tensors,
        **({} if taps is None else {"taps": taps}),
    }
    prefix = "midlayer." if any(n.startswith("midlayer.") for n in files.tensors) else "layers.0."
    is_reduced = options["draft_vocab_size"] != backbone["vocab_size"]
    tensors = _with_whole_maps(files.tensors, backbone["vocab_size"], is_reduced)
    target = TargetIdentity(None, options["target_hidden_size"], backbone["vocab_size"])
    checkpoint = HeadCheckpoint(KIND, options, tensors, target=target, layout=layout)
    return checked(
        checkpoint, files.weights_path, lambda name: name.replace("midlayer.", prefix), _CARRIED
    )


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
    """Config and tensors of a head."""
    options = whole_options(checkpoint, NAME)
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
    """Keys that all layouts of EAGLE-3 share, layers counted as vLLM does."""
    backbone = options["backbone"]
    config = {"draft_vocab_size": options.get("draft_vocab_size", backbone["vocab_size"])}
    width = options.get("target_hidden_size", backbone["hidden_size"])
    if width != backbone["hidden_size"]:
        config["target_hidden_size"] = width
    if "taps" in options:
        _check_taps(options["taps"], target, layout)
        config[IDS] = options["taps"]
    return config


def _check_taps(taps: list[int], target: TargetIdentity | None, layout: str) -> None:
    """Refuse a layer twice, out of order, or the state behind the target's final norm."""
    if sorted(set(taps)) != taps:
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
    """Tell if these are the taps that every engine takes when a config names none."""
    num_layers = target.num_layers if target else None
    return num_layers is not None and taps == [2, num_layers // 2, num_layers - 3]
