"""Every layout by its name: which one a folder is in, and the way in and out."""

from pathlib import Path
from typing import Any

from specdec.checkpoints import eagle, eagle3, medusa, speculators, vllm_medusa
from specdec.checkpoints import specdec as native
from specdec.checkpoints.folder import (
    CONFIG,
    SIDECAR,
    WEIGHT_FILES,
    RawFiles,
    find_folder,
    json_bytes,
    read_raw,
    tensor_bytes,
)
from specdec.checkpoints.head import KINDS, HeadCheckpoint, check_checkpoint, check_tree
from specdec.checkpoints.specdec import check_checksum, completed, described, read_description
from specdec.common.files import whole_folder

# In the order in which they are looked for: an earlier one is told by more.
_OTHERS: dict[str, Any] = {
    module.NAME: module for module in (speculators, medusa, vllm_medusa, eagle3, eagle)
}
LAYOUTS = (native.NAME, *_OTHERS)


def read_head(path: str | Path, revision: str | None = None) -> HeadCheckpoint:
    """Read a head, whatever its layout, which its files tell.

    Args:
        path: folder (`~` is the home folder) or hub id.
        revision: of a hub id.

    Raises:
        FileNotFoundError: no such folder or hub id, or a file is missing.
        ValueError: no head in any known layout, or one whose tensors or facts are not in order;
            the message names the tensor or the fact.
    """
    folder = find_folder(path, revision)
    sidecar = folder / SIDECAR
    fields = read_description(sidecar) if sidecar.exists() else None
    if fields is not None and fields["layout"] == native.NAME:
        checkpoint = native.read(folder, fields)
    else:
        files = read_raw(folder)
        checkpoint = _layout_of(files).read(files)
        if fields is None:
            return checkpoint
        checkpoint = completed(checkpoint, fields, str(sidecar))
    check_checksum(sidecar, checkpoint.tensors)
    return checkpoint


def _layout_of(files: RawFiles) -> Any:
    for module in _OTHERS.values():
        if module.matches(files):
            return module
    raise ValueError(
        f"{files.weights_path!r} holds no draft head in a known layout ({', '.join(LAYOUTS)}); "
        f"its first tensors are {', '.join(sorted(files.tensors)[:3]) or 'none'}"
    )


def write_head(checkpoint: HeadCheckpoint, folder: str | Path, layout: str = "specdec") -> Path:
    """Write a head into a folder, whose other files stay; it is replaced at once, or not at all.

    Args:
        checkpoint: the head, its tensors in the dtype in which they are to be stored.
        folder: made if it is not there; `~` is the home folder.
        layout: one of `LAYOUTS`.

    Returns:
        The folder.

    Raises:
        ValueError: no such layout, something that it cannot hold, or a tensor that is missing, left
            over or wrong, by name; or the folder holds another checkpoint's tensors.
        OSError: it cannot be written; what stood there is as it was.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r} but must be one of {', '.join(LAYOUTS)}")
    if checkpoint.kind not in KINDS:
        raise ValueError(f"kind is {checkpoint.kind!r} but must be one of {', '.join(KINDS)}")
    check_checkpoint(checkpoint, "the head")
    check_tree(checkpoint.tree, "the head")
    place = Path(folder).expanduser()
    module = _OTHERS.get(layout, native)
    others = [n for n in WEIGHT_FILES if n != module.WEIGHTS and (place / n).exists()]
    if others:
        raise ValueError(
            f"{str(place)!r} holds {others[0]} of another checkpoint; give an empty folder"
        )
    files = _files(checkpoint, layout)
    with whole_folder(place) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return place


def _files(checkpoint: HeadCheckpoint, layout: str) -> dict[str, bytes]:
    """Name to content, the description last: it completes the checkpoint."""
    description = json_bytes(described(checkpoint, layout))
    if layout == native.NAME:
        return {native.WEIGHTS: tensor_bytes(checkpoint.tensors), SIDECAR: description}
    module = _OTHERS[layout]
    if checkpoint.kind != module.KIND:
        raise ValueError(
            f"the layout {layout!r} holds heads of the kind {module.KIND!r}, not "
            f"{checkpoint.kind!r}; use the layout 'specdec'"
        )
    config, tensors = module.write(checkpoint)
    return {
        module.WEIGHTS: tensor_bytes(tensors),
        CONFIG: json_bytes(config),
        SIDECAR: description,
    }
