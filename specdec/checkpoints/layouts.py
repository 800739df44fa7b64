"""Every layout by its name: the way in and out, and `specdec.json` beside the tensors.

In our own layout `specdec.json` is all there is to know of a head; beside another one it keeps what
that cannot hold.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.checkpoints.blocks import Assistant, DeepSpec, SpeculatorsBlocks, ZLab
from specdec.checkpoints.eagle import (
    Eagle,
    Eagle3,
    SglangEagle,
    Speculators,
    SpeculatorsPeagle,
)
from specdec.checkpoints.folder import (
    CONFIG,
    SIDECAR,
    WEIGHT_FILES,
    find_folder,
    json_bytes,
    read_raw,
    read_tensors,
    tensor_bytes,
)
from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity, Tree, checked, head_of
from specdec.checkpoints.medusa import Medusa, VllmMedusa
from specdec.checkpoints.mtp import DeepSeekMtp, QwenMtp, SpeculatorsMtp
from specdec.common.config import Config, read_model, validated
from specdec.common.files import flat, read_json, whole_folder
from specdec.registry import head_class

# Our own layout: `specdec.json` and the tensors under our names.
NATIVE, WEIGHTS = "specdec", "model.safetensors"
# In the order in which they are looked for: an earlier one is told by more.
FOREIGN: dict[str, Any] = {
    layout.name: layout
    for layout in (
        *(SpeculatorsBlocks, ZLab, Assistant, DeepSpec),
        *(QwenMtp, DeepSeekMtp, SpeculatorsMtp, SpeculatorsPeagle, Speculators),
        *(Medusa, VllmMedusa, Eagle3, SglangEagle, Eagle),
    )
}
LAYOUTS = (NATIVE, *FOREIGN)


class Description(Config):
    """Content of `specdec.json`; the fields are those of `HeadCheckpoint`.

    Attributes:
        format: version of this content.
        sha256: hash of the rest and of the tensors; None where it was deleted.
    """

    format: Literal[1]
    layout: str
    kind: str
    options: dict[str, Any]
    tree: Tree | None
    target: TargetIdentity | None
    training: dict[str, Any]
    sha256: str | None = None


def read_head(path: str | Path, revision: str | None = None) -> HeadCheckpoint:
    """Read a head from a folder or of a hub id, whatever its layout, which its files tell."""
    folder = find_folder(path, revision)
    sidecar = folder / SIDECAR
    if not sidecar.exists():
        return _read_foreign(folder)
    known = read_model(Description, sidecar)
    try:
        head_class(known.kind).given(known.options)
    except ValueError as error:
        raise ValueError(f"{str(sidecar)!r}: {error}") from error
    if known.layout == NATIVE:
        weights = folder / WEIGHTS
        if not weights.exists():
            raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}; it is incomplete")
        facts = known.kind, known.options, read_tensors(weights), known.tree
        made = HeadCheckpoint(*facts, known.target, known.training)
        checkpoint = checked(made, str(weights))
    else:
        checkpoint = _completed(_read_foreign(folder), known, str(sidecar))
    content = read_json(sidecar)
    if "sha256" in content and content.pop("sha256") != _checksum(content, checkpoint.tensors):
        raise ValueError(
            f"{str(sidecar)!r} or the tensors beside it have changed since they were written; copy "
            "both again, or delete sha256 there"
        )
    return checkpoint


def _read_foreign(folder: Path) -> HeadCheckpoint:
    files = read_raw(folder)
    for layout in FOREIGN.values():
        if layout.matches(files):
            found: HeadCheckpoint = layout.read(files)
            return found
    raise ValueError(
        f"{files.weights_path!r} holds no draft head in a known layout ({', '.join(LAYOUTS)}); its "
        f"first tensors are {', '.join(sorted(files.tensors)[:3]) or 'none'}"
    )


def _completed(found: HeadCheckpoint, known: Description, where: str) -> HeadCheckpoint:
    """Add what stands beside a checkpoint in a layout of the field, which it must not contradict.

    Options are compared as the heads have them that are built of either.
    """
    whole = replace(
        found,
        options=known.options,
        tree=found.tree or known.tree,
        target=known.target or found.target,
        training=known.training,
    )

    def facts() -> Iterator[tuple[str, Any, Any]]:
        yield "layout", known.layout, found.layout
        yield "kind", known.kind, found.kind
        yield "tree", known.tree or found.tree, whole.tree
        for size in ("hidden_size", "vocab_size"):
            told, seen = (getattr(each.target, size, None) for each in (known, found))
            yield f"target.{size}", told or seen, seen or told
        heads = head_of(whole, where), head_of(replace(whole, options=found.options), where)
        ours, theirs = (dict(flat(head.options.model_dump(warnings=False))) for head in heads)
        for name, value in theirs.items():
            yield name, ours.get(name), value

    for name, told, seen in facts():
        if told != seen:
            raise ValueError(
                f"{where!r} says {name} {told!r}, but the files beside it say {seen!r}; copy all "
                "again, or delete specdec.json"
            )
    return whole


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash a description without its hash, and the tensors under our names."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        # Layouts keep the maps of a draft vocabulary in integers of their own.
        plain = tensor.detach().cpu() if tensor.is_floating_point() else tensor.cpu().long()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_head(checkpoint: HeadCheckpoint, folder: str | Path, layout: str = NATIVE) -> Path:
    """Write a head into a folder, whose other files stay; it is replaced at once, or not at all.

    Something that the layout cannot hold, a tensor that is missing, left over or wrong, and a
    folder with another checkpoint's tensors are a ValueError; what stood there is as it was.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r} but must be one of {', '.join(LAYOUTS)}")
    place = Path(folder).expanduser()
    files = _files(checked(checkpoint, "the head"), layout)
    for name in WEIGHT_FILES:
        if name not in files and (place / name).exists():
            raise ValueError(
                f"{str(place)!r} holds {name} of another checkpoint; give an empty one"
            )
    with whole_folder(place) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return place


def _files(checkpoint: HeadCheckpoint, layout: str) -> dict[str, bytes]:
    """Name to content, the description last: it completes the checkpoint."""
    facts = {**vars(checkpoint), "format": 1, "layout": layout}
    tensors = facts.pop("tensors")
    content = validated(Description, facts, "the head").model_dump(exclude={"sha256"})
    json_bytes(content)  # what no file can hold is refused here
    sealed = {SIDECAR: json_bytes({**content, "sha256": _checksum(content, tensors)})}
    if layout == NATIVE:
        return {WEIGHTS: tensor_bytes(tensors), **sealed}
    foreign = FOREIGN[layout]
    if checkpoint.kind != foreign.kind:
        raise ValueError(
            f"the layout {layout!r} holds heads of the kind {foreign.kind!r}, not "
            f"{checkpoint.kind!r}; use the layout 'specdec'"
        )
    config, tensors = foreign.write(checkpoint)
    return {foreign.weights: tensor_bytes(tensors), CONFIG: json_bytes(config), **sealed}
