"""Every layout by its name: which one a folder is in, and the way in and out."""

from pathlib import Path
from typing import Any

from specdec.checkpoints import native
from specdec.checkpoints.folder import SIDECAR, find_folder, write_files
from specdec.checkpoints.head import HeadCheckpoint

_MODULES: dict[str, Any] = {native.NAME: native}
LAYOUTS = tuple(_MODULES)


def read_head(path: str | Path, revision: str | None = None) -> HeadCheckpoint:
    """Read a head, whatever its layout, which its files tell.

    Args:
        path: folder (`~` is the home folder) or hub id.
        revision: of a hub id.

    Raises:
        FileNotFoundError: no such folder or hub id, or a file is missing.
        ValueError: no head in any known layout, or one that contradicts itself.
    """
    folder = find_folder(path, revision)
    if not (folder / SIDECAR).exists():
        raise ValueError(f"{str(path)!r} holds no draft head in a known layout")
    checkpoint: HeadCheckpoint = native.read(folder)
    return checkpoint


def write_head(checkpoint: HeadCheckpoint, folder: str | Path, layout: str = "specdec") -> Path:
    """Write a head into a folder; a file is there whole or not at all.

    Args:
        checkpoint: the head, its tensors in the dtype in which they are to be stored.
        folder: made if it is not there; `~` is the home folder.
        layout: one of `LAYOUTS`.

    Returns:
        The folder.

    Raises:
        ValueError: no such layout, or something that it cannot hold, by name.
    """
    if layout not in _MODULES:
        raise ValueError(f"layout is {layout!r} but must be one of {', '.join(LAYOUTS)}")
    place = Path(folder).expanduser()
    write_files(place, _MODULES[layout].write(checkpoint))
    return place
