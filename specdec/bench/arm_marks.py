"""Short hashes of the files that an arm reads: its plan and its checkpoints."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from specdec.bench.config import ArmConfig
from specdec.checkpoints.folder import CONFIG, SIDECAR

_WEIGHTS = (".safetensors", ".bin", ".pt")
_DESCRIPTIONS = (CONFIG, SIDECAR, "adapter_config.json")


def plan_mark(arm: ArmConfig) -> str | None:
    """A short hash of the plan that an arm follows; None without one, or where it is not there."""
    option = arm.draft_length or {}
    path = Path(str(option["plan"])).expanduser() if "plan" in option else None
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def checkpoint_mark(arm: ArmConfig) -> str | None:
    """A short hash of all weights, with their descriptions, in folders that an arm's options name.

    None for an arm without any. What comes from the hub by its id, or with the package, is not
    read.
    """
    files = [file for folder in _folders(arm.options) for file in _checkpoint(folder)]
    marks = [(path.name, _hash_of_file(path, *_stamp(path))) for path in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16] if marks else None


def _folders(value: Any) -> Iterator[Path]:
    """Every folder in options, those of drafters inside a drafter included."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _folders(inner)
    elif isinstance(value, str) and value:
        path = Path(value).expanduser()
        if path.is_dir():
            yield path


def _checkpoint(folder: Path) -> list[Path]:
    """Its files in order; none where no weights lie."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not any(path.suffix in _WEIGHTS for path in files):
        return []
    return [path for path in files if path.suffix in _WEIGHTS or path.name in _DESCRIPTIONS]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@cache
def _hash_of_file(path: Path, num_bytes: int, changed_ns: int) -> str:
    """Read once by a process while size and time stay: the cells of a sweep share their files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
