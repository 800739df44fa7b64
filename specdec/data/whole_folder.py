"""Folders that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specdec.data.durable import NO_SPACE, make_all_private, make_private


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `folder` when the block ends well.

    What stood there before stays until then. A killed run leaves it under a hidden name beside,
    from where `restore` brings it back.

    Raises:
        OSError: the disk is full; nothing is left of what was written.
    """
    partial, before = _beside(folder, "partial"), _beside(folder, "before")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
        make_private(partial)
        yield partial
        make_all_private(partial)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        restore(folder)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise OSError(
                error.errno,
                f"the disk is full; nothing was written to {str(folder)!r}: free some space or "
                "choose another folder",
            ) from error
        raise
    shutil.rmtree(before, ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo what a run did that was killed while it exchanged the folder for the new one."""
    before = _beside(folder, "before")
    if before.exists() and not folder.exists():
        before.rename(folder)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
