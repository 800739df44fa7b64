"""Layout "specdec": `model.safetensors` under our own names, `specdec.json` beside it."""

from pathlib import Path
from typing import Any

from specdec.checkpoints.folder import read_tensors
from specdec.checkpoints.head import HeadCheckpoint
from specdec.checkpoints.tensors import check_checkpoint

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
