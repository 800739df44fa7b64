"""Layout "eagle": EAGLE-1, which EAGLE-2 shares, as SafeAILab publishes it.

A Llama `config.json` of one layer with `bias` and `qkv_bias`; tensors under our own names.

Source: SafeAILab/EAGLE.
"""

from typing import Any

from torch import Tensor

from specdec.checkpoints.backbone_config import backbone_of, config_of
from specdec.checkpoints.eagle3 import dtype_name
from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import (
    HeadCheckpoint,
    TargetIdentity,
    flag,
    head_shapes,
    known_sizes,
    take_tensors,
    whole_options,
)

NAME, KIND, WEIGHTS = "eagle", "eagle", "model.safetensors"
# Parts of the target that checkpoints carry along; the head never trained them and uses the
# target's own. Old transformers saved a buffer of the rotary embedding, too.
_CARRIED = (
    *("embed_tokens.weight", "lm_head.weight"),
    "layers.0.self_attn.rotary_emb.inv_freq",
)


def matches(files: RawFiles) -> bool:
    """Whether these are the files of this layout."""
    return any(name.startswith(("layers.0.", "fc.")) for name in files.tensors)


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head.

    Raises:
        ValueError: a size is missing in its config, or a tensor is missing, left over or wrong.
    """
    backbone = backbone_of(files.config, files.config_path)
    options = {
        "backbone": backbone,
        "bias": flag(files.config, "bias", True, files.config_path),
        "qkv_bias": flag(files.config, "qkv_bias", False, files.config_path),
    }
    tensors = take_tensors(
        files.weights_path,
        files.tensors,
        head_shapes(KIND, options),
        known_sizes(options),
        carried=_CARRIED,
    )
    identity = TargetIdentity(None, backbone["hidden_size"], backbone["vocab_size"])
    return HeadCheckpoint(KIND, options, tensors, target=identity, layout=NAME)


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a head.

    Raises:
        ValueError: an option that this layout cannot hold.
    """
    options = whole_options(KIND, checkpoint.options, NAME)
    config = {"architectures": ["LlamaForCausalLM"], **config_of(options["backbone"])}
    config |= {"bias": options["bias"], "qkv_bias": options["qkv_bias"]}
    config["torch_dtype"] = dtype_name(checkpoint.tensors)
    return config, checkpoint.tensors
