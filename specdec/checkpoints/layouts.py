"""Every layout by its name: which one a folder is in, and the way in and out."""

from pathlib import Path
from typing import Any

from specdec.checkpoints import eagle, eagle3, medusa, speculators, vllm_medusa
from specdec.checkpoints.folder import (
    CONFIG,
    SIDECAR,
    WEIGHT_FILES,
    RawFiles,
    find_folder,
    json_bytes,
    read_raw,
    read_tensors,
    tensor_bytes,
)
from specdec.checkpoints.head import HeadCheckpoint, checked
from specdec.checkpoints.sidecar import (
    Description,
    check_checksum,
    completed,
    describe,
    read_description,
)
from specdec.common.files import whole_folder

# Our own layout: `specdec.json` and the tensors under our names.
NATIVE, WEIGHTS = "specdec", "model.safetensors"
# In the order in which they are looked for: an earlier one is told by more.
FOREIGN: dict[str, Any] = {
    module.NAME: module for module in (speculators, medusa, vllm_medusa, eagle3, eagle)
}
LAYOUTS = (NATIVE, *FOREIGN)


def read_head(path: str | Path, revision: str | None = None) -> HeadCheckpoint:
    """Read a head, whatever its layout, which its files tell.

    Args:
        path: folder (`~` is the home folder) or hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: no such folder or hub id, or a file is missing.
        ValueError: no head in any known layout, or one whose tensors or facts are not in order;
            the message names the tensor or the fact.
    """
    folder = find_folder(path, revision)
    sidecar = folder / SIDECAR
    known = read_description(sidecar) if sidecar.exists() else None
    if known is not None and known.layout == NATIVE:
        checkpoint = _read_native(folder, known)
    else:
        files = read_raw(folder)
        checkpoint = _layout_of(files).read(files)
        if known is None:
            return checkpoint
        checkpoint = completed(checkpoint, known, str(sidecar))
    check_checksum(sidecar, checkpoint.tensors)
    return checkpoint


def _read_native(folder: Path, known: Description) -> HeadCheckpoint:
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}; the checkpoint is incomplete")
    checkpoint = HeadCheckpoint(
        known.kind, known.options, read_tensors(path), known.tree, known.target, known.training
    )
    return checked(checkpoint, str(path))


def _layout_of(files: RawFiles) -> Any:
    for module in FOREIGN.values():
        if module.matches(files):
            return module
    raise ValueError(
        f"{files.weights_path!r} holds no draft head in a known layout ({', '.join(LAYOUTS)}); "
        f"its first tensors are {', '.join(sorted(files.tensors)[:3]) or 'none'}"
    )


def write_head(checkpoint: HeadCheckpoint, folder: str | Path, layout: str = NATIVE) -> Path:
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
    place = Path(folder).expanduser()
    files = _files(checked(checkpoint, "the head"), layout)
    others = [name for name in WEIGHT_FILES if name not in files and (place / name).exists()]
    if others:
        raise ValueError(
            f"{str(place)!r} holds {others[0]} of another checkpoint; give an empty folder"
        )
    with whole_folder(place) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return place


def _files(checkpoint: HeadCheckpoint, layout: str) -> dict[str, bytes]:
    """Name to content, the description last: it completes the checkpoint."""
    description = describe(checkpoint, layout)
    if layout == NATIVE:
        return {WEIGHTS: tensor_bytes(checkpoint.tensors), SIDECAR: description}
    module = FOREIGN[layout]
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
