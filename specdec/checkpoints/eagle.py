"""Layout "eagle": EAGLE-1, which EAGLE-2 shares, as SafeAILab publishes it.

A Llama `config.json` of one layer with `bias` and `qkv_bias`; tensors under our own names.

Source: SafeAILab/EAGLE.
"""

from typing import Any

from torch import Tensor

from specdec.checkpoints.folder import RawFiles, dtype_name
from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity, checked
from specdec.checkpoints.llama_config import ForeignConfig, backbone_of, config_of, whole_options
from specdec.common.config import validated

NAME, KIND, WEIGHTS = "eagle", "eagle", "model.safetensors"
# Parts of the target that checkpoints carry along; the head never trained them and uses the
# target's own. Old transformers saved a buffer of the rotary embedding, too.
_CARRIED = (
    *("embed_tokens.weight", "lm_head.weight"),
    "layers.0.self_attn.rotary_emb.inv_freq",
)


class _Flags(ForeignConfig):
    bias: bool | None = None
    qkv_bias: bool | None = None


def matches(files: RawFiles) -> bool:
    """Tell if these are the files of this layout."""
    return any(name.startswith(("layers.0.", "fc.")) for name in files.tensors)


def read(files: RawFiles) -> HeadCheckpoint:
    """Read a head."""
    backbone = backbone_of(files.config, files.config_path)
    flags = validated(_Flags, files.config, repr(files.config_path))
    options = {
        "backbone": backbone,
        "bias": flags.bias is not False,
        "qkv_bias": flags.qkv_bias is True,
    }
    identity = TargetIdentity(None, backbone["hidden_size"], backbone["vocab_size"])
    checkpoint = HeadCheckpoint(KIND, options, files.tensors, target=identity, layout=NAME)
    return checked(checkpoint, files.weights_path, carried=_CARRIED)


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a head."""
    options = whole_options(checkpoint, NAME)
    config = {"architectures": ["LlamaForCausalLM"], **config_of(options["backbone"])}
    config |= {"bias": options["bias"], "qkv_bias": options["qkv_bias"]}
    config["torch_dtype"] = dtype_name(checkpoint.tensors)
    return config, checkpoint.tensors
