"""`specdec.json`: what a head is, in our own words, beside its tensors in any layout.

In our own layout it is all there is to know; beside another one it keeps what that cannot hold.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.backbone_config import rope_of
from specdec.checkpoints.folder import json_bytes, read_tensors
from specdec.checkpoints.head import (
    KINDS,
    HeadCheckpoint,
    TargetIdentity,
    are_published,
    check_checkpoint,
    check_options,
    check_tree,
    count,
    filled,
    section,
    text,
)
from specdec.common.files import read_json

FORMAT = 1


def described(checkpoint: HeadCheckpoint, layout: str) -> dict[str, Any]:
    """All of a checkpoint but its tensors, as `specdec.json` holds it."""
    content = {
        "format": FORMAT,
        "layout": layout,
        "kind": checkpoint.kind,
        "options": checkpoint.options,
        "tree": checkpoint.tree,
        "target": None if checkpoint.target is None else asdict(checkpoint.target),
        "training": checkpoint.training,
    }
    json_bytes(content)  # what no file can hold is refused here
    return {**content, "sha256": _checksum(content, checkpoint.tensors)}


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
    """Refuse a description or tensors that are not those that were written together.

    Args:
        path: of the description; one of an older version has no checksum.
        tensors: of the checkpoint, under our names.

    Raises:
        ValueError: the checksum is another one.
    """
    content = read_json(path)
    if "sha256" in content and content.pop("sha256") != _checksum(content, tensors):
        raise ValueError(
            f"{str(path)!r} or the tensors beside it have changed since they were written (the "
            "SHA-256 is another one); copy both again or, if they were changed on purpose, delete "
            "sha256 there"
        )


def read_description(path: Path) -> dict[str, Any]:
    """Fields of `HeadCheckpoint` other than its tensors, and the layout they stand beside.

    Raises:
        ValueError: another format, or fields that are missing, left over or of a wrong type.
    """
    content = read_json(path)
    content.pop("sha256", None)  # see `check_checksum`
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
        content["target"] = _identity(content["target"], str(path))
    check_options(content["options"], str(path))
    check_tree(content["tree"], str(path))
    return content


def _identity(facts: dict[str, Any], where: str) -> TargetIdentity:
    for name in ("name", "weights", "tokenizer"):
        text(facts, name, where)
    for name in ("hidden_size", "vocab_size", "num_layers"):
        count(facts, name, where)
    section(facts, "facts", where)
    for name, pair in section(facts, "magnitudes", where).items():
        if not isinstance(pair, list) or [type(each) for each in pair] != [float, float]:
            raise ValueError(f"{where!r}: magnitude {name} is {pair!r} but must be two numbers")
    try:
        return TargetIdentity(**facts)
    except TypeError as error:
        raise ValueError(f"{where!r}: target cannot be read ({error})") from error


def completed(checkpoint: HeadCheckpoint, fields: dict[str, Any], where: str) -> HeadCheckpoint:
    """A checkpoint in a layout of the field, with what stands beside it.

    Args:
        checkpoint: as its own files tell it.
        fields: from `read_description`.
        where: the description, for messages.

    Raises:
        ValueError: both tell a fact and differ.
    """
    for name in ("layout", "kind"):
        _compare(name, fields[name], getattr(checkpoint, name), where)
    if None not in (fields["tree"], checkpoint.tree):
        _compare("tree", fields["tree"], checkpoint.tree, where)
    ours, theirs = filled(fields["kind"], fields["options"]), checkpoint.options
    for name, value in theirs.items():
        if name == "backbone":
            _compare_backbones(ours.get(name, {}), value, where)
        elif name in ours or name == "taps":
            _compare(name, ours.get(name), value, where)
    known, found = fields["target"], checkpoint.target
    taps = ours.get("taps")
    if taps is not None and "taps" not in theirs and not are_published(taps, known):
        _compare("taps", taps, None, where)
    if known is not None and found is not None:
        for fact in ("hidden_size", "vocab_size"):
            if None not in (getattr(known, fact), getattr(found, fact)):
                _compare(f"target.{fact}", getattr(known, fact), getattr(found, fact), where)
    return replace(
        checkpoint,
        options=fields["options"],
        tree=fields["tree"] if checkpoint.tree is None else checkpoint.tree,
        target=known or found,
        training=fields["training"],
    )


def _compare_backbones(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    for name, value in theirs.items():
        known = ours.get(name, value)
        if name == "rope_parameters" and isinstance(known, dict):
            known = rope_of({"rope_parameters": known}, where)
        _compare(f"backbone.{name}", known, value, where)


def _compare(name: str, ours: Any, theirs: Any, where: str) -> None:
    if ours != theirs:
        raise ValueError(
            f"{where!r} says {name} {ours!r}, but the files beside it say {theirs!r}; if they were "
            "changed on purpose, delete specdec.json"
        )


NAME, WEIGHTS = "specdec", "model.safetensors"


def read(folder: Path, fields: dict[str, Any]) -> HeadCheckpoint:
    """Read a head.

    Args:
        folder: with the tensors.
        fields: from `read_description`.

    Raises:
        FileNotFoundError: no tensors.
        ValueError: a tensor is missing, left over or wrong.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}; the checkpoint is incomplete")
    checkpoint = HeadCheckpoint(tensors=read_tensors(path), **fields)
    check_checkpoint(checkpoint, str(path))
    return checkpoint
