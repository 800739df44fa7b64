"""Layout "vllm-medusa": Medusa heads as vLLM up to 0.32 serves them; later ones dropped Medusa.

Source: vLLM 0.32, `MedusaConfig` and `Medusa`.
"""

import re
from typing import Any

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from specdec.checkpoints.folder import RawFiles, dtype_name
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity, checked
from specdec.checkpoints.llama_config import ForeignConfig
from specdec.checkpoints.medusa import checked_options
from specdec.common.config import validated

NAME, KIND, WEIGHTS = "vllm-medusa", "medusa", "model.safetensors"
# With `original_lm_head` these are copies of the target's projection.
_COPIES = ("lm_head.weight", "lm_heads.0.weight")


class _Keys(ForeignConfig):
    hidden_size: Count
    vocab_size: Count
    num_heads: Count = Field(validation_alias=AliasChoices("num_heads", "medusa_num_heads"))
    num_hidden_layers: Count = Field(
        validation_alias=AliasChoices("num_hidden_layers", "medusa_num_layers")
    )
    truncated_vocab_size: Count | None = None
    original_lm_head: bool | None = None
    medusa_fc_bias: bool | None = None


def matches(files: RawFiles) -> bool:
    """Tell if these are the files of this layout."""
    return files.config.get("model_type") == "medusa" or any(
        re.match(r"(medusa_heads\.)?blocks\.\d+\.layers\.", name) for name in files.tensors
    )


def read(files: RawFiles) -> HeadCheckpoint:
    """Read heads."""
    where = files.config_path
    keys = validated(_Keys, files.config, repr(where))
    if keys.truncated_vocab_size not in (None, keys.vocab_size):
        raise ValueError(
            f"{where!r} has truncated_vocab_size {keys.truncated_vocab_size}: Medusa heads with a "
            "reduced vocabulary are not supported"
        )
    options = {
        "hidden_size": keys.hidden_size,
        "vocab_size": keys.vocab_size,
        "num_heads": keys.num_heads,
        "num_layers": keys.num_hidden_layers,
        "own_vocab_head": not keys.original_lm_head,
    }
    tensors = {_vllm_name(name): tensor for name, tensor in files.tensors.items()}
    if not keys.medusa_fc_bias:
        tensors = _with_zero_biases(tensors, files.weights_path)
    target = TargetIdentity(None, keys.hidden_size, keys.vocab_size)
    checkpoint = HeadCheckpoint(KIND, options, tensors, target=target, layout=NAME)
    # vLLM leaves the map alone where the vocabulary is whole.
    carried = ("token_map", *(_COPIES if keys.original_lm_head else ()))
    return checked(checkpoint, files.weights_path, _name, carried)


def _vllm_name(name: str) -> str:
    """A tensor's name in this layout; vLLM takes the names of FasterDecoding for it, too."""
    name = name.removeprefix("medusa_heads.")
    if old := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return f"blocks.{old[1]}.layers.{old[2]}.{old[3]}"
    if old := re.fullmatch(r"(\d+)\.\d+\.weight", name):
        return f"lm_heads.{old[1]}.weight"
    return name


def _with_zero_biases(given: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A block without a bias computes what ours does with zeros."""
    biases = sorted(n for n in given if n.startswith("blocks.") and n.endswith(".bias"))
    if biases:
        raise ValueError(
            f"{where!r} has the tensor {biases[0]}, which its config does not ask for: set "
            "medusa_fc_bias to true in config.json"
        )
    zeros = {
        name.removesuffix("weight") + "bias": torch.zeros(len(weight), dtype=weight.dtype)
        for name, weight in given.items()
        if name.startswith("blocks.") and name.endswith(".weight")
    }
    return given | zeros


def _name(name: str) -> str:
    """The layout's name of one of our tensors."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return f"blocks.{parts[1]}.layers.{parts[2]}.{parts[4]}"
    return f"lm_heads.{parts[1]}.weight"


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of heads."""
    options = checked_options(checkpoint, NAME)
    if not options.own_vocab_head:
        raise ValueError(
            f"the layout {NAME!r} cannot hold heads without their own vocabulary projection "
            "(own_vocab_head=false): it wants a copy of the target's; use the layout 'medusa'"
        )
    vocab_size, hidden_size = checkpoint.tensors["vocab_heads.0.weight"].shape
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size,
        "num_heads": options.num_heads,
        "num_hidden_layers": options.num_layers,
        "original_lm_head": False,
        "medusa_fc_bias": True,
        "torch_dtype": dtype_name(checkpoint.tensors),
    }
    return config, {_name(name): tensor for name, tensor in checkpoint.tensors.items()}
