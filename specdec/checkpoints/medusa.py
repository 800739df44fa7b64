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
from specdec.checkpoints.head import (
    HeadCheckpoint,
    TargetIdentity,
    check_tree,
    count,
    filled,
    head_shapes,
    take_tensors,
    text,
)

NAME, KIND, WEIGHTS = "medusa", "medusa", "medusa_lm_head.safetensors"
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.(\d+)\.weight")


def matches(files: RawFiles) -> bool:
    """Whether these are the files of this layout."""
    return files.weights.startswith("medusa_lm_head.")


def read(files: RawFiles) -> HeadCheckpoint:
    """Read heads.

    Raises:
        ValueError: the config counts other heads than there are, or wrong tensors.
    """
    config, where = files.config, files.config_path
    num_heads, num_layers = _counts(files)
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "num_layers": num_layers,
        "own_vocab_head": any(_PROJECTION.fullmatch(name) for name in files.tensors),
    }
    sizes = _sizes(files.tensors)
    tensors = take_tensors(
        files.weights_path,
        files.tensors,
        head_shapes(KIND, options),
        sizes,
        lambda name: _name(name, num_layers),
    )
    options |= sizes
    name = text(config, "base_model_name_or_path", where)
    target = TargetIdentity(name, sizes["hidden_size"], sizes.get("vocab_size"))
    tree = config.get("medusa_choices")
    check_tree(tree, where)
    return HeadCheckpoint(KIND, options, tensors, tree=tree, target=target, layout=NAME)


def _counts(files: RawFiles) -> tuple[int, int]:
    """Heads and their layers: those that the config counts, else those that are there."""
    found = [m for name in files.tensors if (m := _BLOCK.fullmatch(name))]
    if not found:
        raise ValueError(
            f"{files.weights_path!r} has no tensor named as Medusa's '0.0.linear.weight'; its "
            f"first is {next(iter(files.tensors), 'none')}"
        )
    there = [1 + max(int(m[group]) for m in found) for group in (1, 2)]
    counts = []
    for name, number in zip(("medusa_num_heads", "medusa_num_layers"), there, strict=True):
        said = count(files.config, name, files.config_path) or number
        # The configs published first count 2 heads where their files hold 5.
        is_known_mistake = name == "medusa_num_heads" and (said, number) == (2, 5)
        if said != number and not is_known_mistake:
            raise ValueError(
                f"{files.config_path!r} has {name} {said} but {files.weights!r} holds {number}; "
                "correct the config, or copy the tensors again"
            )
        counts.append(number)
    return counts[0], counts[1]


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


def check_tap(options: dict[str, Any], target: TargetIdentity | None, layout: str) -> None:
    """Refuse heads that read another state than the target's last, which these layouts imply.

    Raises:
        ValueError: naming the tap.
    """
    num_layers = target.num_layers if target else None
    if None not in (options.get("tap"), num_layers) and options["tap"] != num_layers:
        raise ValueError(
            f"the layout {layout!r} cannot hold the tap {options['tap']}: its heads read the last "
            f"state of the target, {num_layers}; use the layout 'specdec'"
        )


def write(checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of heads.

    Raises:
        ValueError: an option that this layout cannot hold.
    """
    options, target = filled(KIND, checkpoint.options), checkpoint.target
    check_tap(options, target, NAME)
    num_layers = options["num_layers"]
    config: dict[str, Any] = {
        "medusa_num_heads": options["num_heads"],
        "medusa_num_layers": num_layers,
        "base_model_name_or_path": target.name if target else None,
    }
    if not options["own_vocab_head"]:
        config["version"] = "2"
    if checkpoint.tree is not None:
        config["medusa_choices"] = checkpoint.tree
    return config, {_name(name, num_layers): t for name, t in checkpoint.tensors.items()}
