"""Layout "specdec": `model.safetensors` under our own names, `specdec.json` beside it.

The same `specdec.json` stands beside other layouts too, for what they cannot hold.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.checkpoints.folder import (
    SIDECAR,
    json_bytes,
    read_json,
    read_tensors,
    tensor_bytes,
)
from specdec.checkpoints.head import KINDS, HeadCheckpoint, TargetIdentity

NAME, WEIGHTS, FORMAT = "specdec", "model.safetensors", 1


def described(checkpoint: HeadCheckpoint, layout: str) -> dict[str, Any]:
    """All of a checkpoint but its tensors, as `specdec.json` holds it."""
    return {
        "format": FORMAT,
        "layout": layout,
        "kind": checkpoint.kind,
        "options": checkpoint.options,
        "tree": checkpoint.tree,
        "target": None if checkpoint.target is None else asdict(checkpoint.target),
        "training": checkpoint.training,
    }


def read_description(path: Path) -> dict[str, Any]:
    """Fields of `HeadCheckpoint` other than its tensors, and the layout they stand beside.

    Raises:
        ValueError: another format, or fields that are missing, left over or of a wrong type.
    """
    content = read_json(path)
    version = content.pop("format", None)
    if version != FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {version!r} but this specdec reads format {FORMAT}; "
            "upgrade specdec, or write the checkpoint again"
        )
    types: dict[str, tuple[type, ...]] = {
        "layout": (str,),
        "kind": (str,),
        "options": (dict,),
        "tree": (list, type(None)),
        "target": (dict, type(None)),
        "training": (dict,),
    }
    if set(content) != set(types):
        odd = sorted(set(content) ^ set(types))
        raise ValueError(f"{str(path)!r} must have the keys {', '.join(types)}; check {odd}")
    for name, kinds in types.items():
        if not isinstance(content[name], kinds):
            raise ValueError(
                f"{str(path)!r}: {name} is {content[name]!r}, which is no {kinds[0].__name__}"
            )
    if content["kind"] not in KINDS:
        raise ValueError(
            f"{str(path)!r}: kind is {content['kind']!r} but must be one of {', '.join(KINDS)}"
        )
    if content["target"] is not None:
        try:
            content["target"] = TargetIdentity(**content["target"])
        except TypeError as error:
            raise ValueError(f"{str(path)!r}: target cannot be read ({error})") from error
    return content


def read(folder: Path) -> HeadCheckpoint:
    """Read a head in our own layout.

    Raises:
        ValueError: files that are missing, corrupt or contradict each other.
    """
    fields = read_description(folder / SIDECAR)
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}; the checkpoint is incomplete")
    return HeadCheckpoint(tensors=read_tensors(folder / WEIGHTS), **fields)


def write(checkpoint: HeadCheckpoint) -> dict[str, bytes]:
    """The files of a head in our own layout."""
    return {
        WEIGHTS: tensor_bytes(checkpoint.tensors),
        SIDECAR: json_bytes(described(checkpoint, NAME)),
    }
