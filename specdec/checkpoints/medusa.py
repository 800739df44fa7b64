"""Layout "medusa": heads as FasterDecoding publishes them.

`medusa_lm_head.safetensors` or `.pt`: version 1 with a vocabulary projection for every head,
version 2 without, and a small `config.json`.

Source: FasterDecoding/Medusa.
"""

import re
from statistics import mode
from typing import Any

from torch import Tensor

from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import Count, HeadCheckpoint, TargetIdentity, checked
from specdec.checkpoints.llama_config import ForeignConfig
from specdec.common.config import validated
from specdec.registry import head_class

NAME, KIND, WEIGHTS = "medusa", "medusa", "medusa_lm_head.safetensors"
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.(\d+)\.weight")


class _Keys(ForeignConfig):
    medusa_num_heads: Count | None = None
    medusa_num_layers: Count | None = None
    base_model_name_or_path: str | None = None
    medusa_choices: list[list[int]] | None = None


def matches(files: RawFiles) -> bool:
    """Tell if these are the files of this layout."""
    return files.weights.startswith("medusa_lm_head.")


def read(files: RawFiles) -> HeadCheckpoint:
    """Read heads."""
    keys = validated(_Keys, files.config, repr(files.config_path))
    num_heads, num_layers = _counts(files, keys)
    sizes = _sizes(files.tensors)
    options = {
        "num_heads": num_heads,
        "num_layers": num_layers,
        "own_vocab_head": any(_PROJECTION.fullmatch(name) for name in files.tensors),
        **sizes,
    }
    target = TargetIdentity(
        keys.base_model_name_or_path, sizes["hidden_size"], sizes.get("vocab_size")
    )
    checkpoint = HeadCheckpoint(
        KIND, options, files.tensors, keys.medusa_choices, target, layout=NAME
    )
    return checked(checkpoint, files.weights_path, lambda name: _name(name, num_layers))


def _counts(files: RawFiles, keys: _Keys) -> tuple[int, int]:
    """Heads and their layers: those that the config counts, else those that are there."""
    found = [m for name in files.tensors if (m := _BLOCK.fullmatch(name))]
    if not found:
        raise ValueError(
            f"{files.weights_path!r} has no tensor named as Medusa's '0.0.linear.weight'; its "
            f"first is {next(iter(files.tensors), 'none')}"
        )
    num_heads, num_layers = (1 + max(int(m[group]) for m in found) for group in (1, 2))
    counted = {
        "medusa_num_heads": (keys.medusa_num_heads, num_heads),
        "medusa_num_layers": (keys.medusa_num_layers, num_layers),
    }
    for name, (said, number) in counted.items():
        # The configs published first count 2 heads where their files hold 5.
        is_known_mistake = name == "medusa_num_heads" and (said, number) == (2, 5)
        if said not in (None, number) and not is_known_mistake:
            raise ValueError(
                f"{files.config_path!r} has {name} {said} but {files.weights!r} holds {number}; "
                "correct the config, or copy the tensors again"
            )
    return num_heads, num_layers


def _name(name: str, num_layers: int) -> str:
    """The layout's name of one of our tensors."""
    if name.startswith("blocks."):
        return name.removeprefix("blocks.")
    return f"{name.split('.')[1]}.{num_layers}.weight"


def _sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """H, and V where heads bring their own projections: what most tensors say.

    Nothing else tells them, and it is the odd tensor out that is to be named.
    """
    widths = [tensor.shape[-1] for tensor in tensors.values() if tensor.ndim]
    rows = [len(t) for name, t in tensors.items() if _PROJECTION.fullmatch(name) and t.ndim]
    sizes = {"hidden_size": mode(widths)}
    return sizes | ({"vocab_size": mode(rows)} if rows else {})


def checked_options(checkpoint: HeadCheckpoint, layout: str) -> Any:
    """Options of heads that read the target's last state, as these layouts imply."""
    options = head_class(checkpoint.kind).given(checkpoint.options)
    num_layers = checkpoint.target.num_layers if checkpoint.target else None
    if None not in (options.tap, num_layers) and options.tap != num_layers:
        raise ValueError(
            f"the layout {layout!r} cannot hold the tap {options.tap}: its heads read the last "
            f"state of the target, {num_layers}; use the layout 'specdec'"
        )
    return options


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of heads."""
    options = checked_options(checkpoint, NAME)
    config: dict[str, Any] = {
        "medusa_num_heads": options.num_heads,
        "medusa_num_layers": options.num_layers,
        "base_model_name_or_path": checkpoint.target.name if checkpoint.target else None,
    }
    if not options.own_vocab_head:
        config["version"] = "2"
    if checkpoint.tree is not None:
        config["medusa_choices"] = checkpoint.tree
    tensors = checkpoint.tensors.items()
    return config, {_name(name, options.num_layers): tensor for name, tensor in tensors}
