"""Layout "vllm-medusa": Medusa heads as vLLM up to 0.32 serves them; later ones dropped Medusa.

Source: vLLM 0.32, `MedusaConfig` and `Medusa`.
"""

import re
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import (
    HeadCheckpoint,
    TargetIdentity,
    count,
    filled,
    flag,
    head_shapes,
    take_tensors,
)
from specdec.checkpoints.medusa import check_tap

NAME, KIND, WEIGHTS = "vllm-medusa", "medusa", "model.safetensors"
# With `original_lm_head` these are copies of the target's projection.
_COPIES = ("lm_head.weight", "lm_heads.0.weight")


def matches(files: RawFiles) -> bool:
    """Whether these are the files of this layout."""
    return files.config.get("model_type") == "medusa" or any(
        re.match(r"(medusa_heads\.)?blocks\.\d+\.layers\.", name) for name in files.tensors
    )


def read(files: RawFiles) -> HeadCheckpoint:
    """Read heads.

    Raises:
        ValueError: a reduced vocabulary, or a tensor that is missing, left over or wrong.
    """
    config = files.config
    where = files.config_path
    sizes = {name: _size(config, where, name) for name in ("hidden_size", "vocab_size")}
    reduced = count(config, "truncated_vocab_size", where)
    if reduced not in (None, sizes["vocab_size"]):
        raise ValueError(
            f"{where!r} has truncated_vocab_size {reduced}: Medusa heads with a "
            "reduced vocabulary are not supported"
        )
    options: dict[str, Any] = {
        "num_heads": _size(config, where, "num_heads", "medusa_num_heads"),
        "num_layers": _size(config, where, "num_hidden_layers", "medusa_num_layers"),
        "own_vocab_head": not flag(config, "original_lm_head", False, where),
    }
    given = {_vllm_name(name): tensor for name, tensor in files.tensors.items()}
    if not flag(config, "medusa_fc_bias", False, where):
        given = _with_zero_biases(given, files.weights_path)
    shapes = head_shapes(KIND, options)
    # vLLM leaves the map alone where the vocabulary is whole.
    carried = ("token_map", *(() if options["own_vocab_head"] else _COPIES))
    tensors = take_tensors(files.weights_path, given, shapes, sizes, _name, carried)
    options |= sizes
    target = TargetIdentity(None, sizes["hidden_size"], sizes["vocab_size"])
    return HeadCheckpoint(KIND, options, tensors, target=target, layout=NAME)


def _size(config: dict[str, Any], where: str, *names: str) -> int:
    """A size under the first of the names that is there."""
    found = [size for name in names if (size := count(config, name, where))]
    if not found:
        raise ValueError(f"{where!r} lacks {names[0]}; copy it from the run that made the heads")
    return found[0]


def _vllm_name(name: str) -> str:
    """A tensor's name in this layout; vLLM takes the names of FasterDecoding for it, too."""
    name = name.removeprefix("medusa_heads.")
    if old := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return f"blocks.{old[1]}.layers.{old[2]}.{old[3]}"
    if old := re.fullmatch(r"(\d+)\.\d+\.weight", name):
        return f"lm_heads.{old[1]}.weight"
    return name


def _with_zero_biases(given: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A block without a bias computes what ours does with zeros.

    Raises:
        ValueError: there are biases, which vLLM would drop without a word.
    """
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
    """Config and tensors of heads.

    Raises:
        ValueError: an option that this layout cannot hold.
    """
    options = filled(KIND, checkpoint.options)
    check_tap(options, checkpoint.target, NAME)
    if not options["own_vocab_head"]:
        raise ValueError(
            f"the layout {NAME!r} cannot hold heads without their own vocabulary projection "
            "(own_vocab_head=false): it wants a copy of the target's; use the layout 'medusa'"
        )
    weight = checkpoint.tensors["vocab_heads.0.weight"]
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": weight.shape[1],
        "vocab_size": weight.shape[0],
        "truncated_vocab_size": weight.shape[0],
        "num_heads": options["num_heads"],
        "num_hidden_layers": options["num_layers"],
        "original_lm_head": False,
        "medusa_fc_bias": True,
        "torch_dtype": str(weight.dtype).removeprefix("torch."),
    }
    return config, {_name(name): tensor for name, tensor in checkpoint.tensors.items()}
