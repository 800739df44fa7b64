"""`specdec.json`: what a head is, beside its tensors in any layout.

In our own layout it is all there is to know; beside another one it keeps what that cannot hold.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.checkpoints.eagle3 import are_published
from specdec.checkpoints.folder import json_bytes
from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity, check_tree
from specdec.checkpoints.llama_config import plain_rope
from specdec.common.config import Config, read_model
from specdec.common.files import read_json
from specdec.registry import head_class


class Description(Config):
    """Content of `specdec.json`; the fields are those of `HeadCheckpoint`.

    Attributes:
        format: version of this content.
        sha256: see `checksum`; None for a file of an older version.
    """

    format: Literal[1]
    layout: str
    kind: str
    options: dict[str, Any]
    tree: list[list[int]] | None
    target: TargetIdentity | None
    training: dict[str, Any]
    sha256: str | None = None


def describe(checkpoint: HeadCheckpoint, layout: str) -> bytes:
    """All of a checkpoint but its tensors, as `specdec.json` holds it."""
    content = {
        "format": 1,
        "layout": layout,
        "kind": checkpoint.kind,
        "options": checkpoint.options,
        "tree": checkpoint.tree,
        "target": None if checkpoint.target is None else asdict(checkpoint.target),
        "training": checkpoint.training,
    }
    json_bytes(content)  # what no file can hold is refused here
    return json_bytes({**content, "sha256": _checksum(content, checkpoint.tensors)})


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a description without it, and of the tensors under our names."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        # Layouts keep the maps of a draft vocabulary in integers of their own.
        plain = tensor.detach().cpu() if tensor.is_floating_point() else tensor.cpu().long()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_checksum(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a description or tensors that are not those that were written together."""
    content = read_json(path)
    if "sha256" in content and content.pop("sha256") != _checksum(content, tensors):
        raise ValueError(
            f"{str(path)!r} or the tensors beside it have changed since they were written (the "
            "SHA-256 is another one); copy both again or, if they were changed on purpose, delete "
            "sha256 there"
        )


def read_description(path: Path) -> Description:
    """Read `specdec.json`."""
    found = read_model(Description, path)
    try:
        head_class(found.kind).given(found.options)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    check_tree(found.tree, str(path))
    return found


def completed(checkpoint: HeadCheckpoint, known: Description, where: str) -> HeadCheckpoint:
    """A checkpoint in a layout of the field, with what stands beside it."""
    ours = _facts(known.layout, known.kind, known.options, known.target)
    theirs = _facts(checkpoint.layout, checkpoint.kind, checkpoint.options, checkpoint.target)
    if None not in (known.tree, checkpoint.tree):
        ours["tree"], theirs["tree"] = known.tree, checkpoint.tree
    taps = ours.get("taps")
    if "taps" in theirs or (taps is not None and not are_published(taps, known.target)):
        ours["taps"], theirs["taps"] = taps, theirs.get("taps")  # none are the published ones
    for name, value in theirs.items():
        if ours.get(name, value) != value:
            raise ValueError(
                f"{where!r} says {name} {ours[name]!r}, but the files beside it say {value!r}; if "
                "they were changed on purpose, delete specdec.json"
            )
    return replace(
        checkpoint,
        options=known.options,
        tree=known.tree if checkpoint.tree is None else checkpoint.tree,
        target=known.target or checkpoint.target,
        training=known.training,
    )


def _facts(
    layout: str, kind: str, options: dict[str, Any], target: TargetIdentity | None
) -> dict[str, Any]:
    """Facts that a description and the files beside it may both tell."""
    facts: dict[str, Any] = {"layout": layout, "kind": kind}
    facts |= head_class(kind).given(options).model_dump(exclude_none=True)
    for name, value in facts.pop("backbone", {}).items():
        is_rope = name == "rope_parameters"
        facts[f"backbone.{name}"] = plain_rope(value) if is_rope else value
    for name in ("hidden_size", "vocab_size"):
        if target is not None and getattr(target, name) is not None:
            facts[f"target.{name}"] = getattr(target, name)
    return facts
