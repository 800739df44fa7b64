"""A name is a path here or an id on the hub; a misspelt path must not become a download."""

import logging
import os
import re
from pathlib import Path

HUB = "hub:"
_ID = re.compile(r"\w[\w.-]{,95}(/\w[\w.-]{,95})?", re.ASCII)
# Folders and files of one's own, as people call them.
_FOLDER = re.compile(
    "answers|cache|checkpoints?|ckpts?|data|datasets?|drafters?|experiments|exports?|features|heads"
    "|home|logs?|mnt|models?|outputs?|out|prompts|queries|recipes|results|runs?|store|targets?"
    "|tests?|te?mp|weights",
    re.IGNORECASE,
)
_FILE = re.compile(
    r".*\.(arrow|bin|csv|gguf|gz|jsonl?|log|md|parquet|pth?|py|safetensors|tsv|txt|ya?ml|zip|zst)",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)


def find_path(name: str, wanted: str) -> Path | str:
    """Find a path that is here, or the id of something on the hub, which the log then says."""
    hub_id = name.removeprefix(HUB)
    if hub_id != name:
        if not _ID.fullmatch(hub_id):
            raise ValueError(f"{name!r} is no id of the hub; write hub:owner/name")
    else:
        path = Path(os.path.expanduser(name))
        if os.path.exists(path):  # no error for a name that is too long
            return path
        first = path.parts[0] if path.parts else ""
        is_own = _FOLDER.fullmatch(first) or (first != name and os.path.isdir(first))
        if is_own or _FILE.fullmatch(name) or not _ID.fullmatch(name):
            raise FileNotFoundError(
                f"{name!r} is not a folder or file here; give {wanted}, or a hub id, hub:owner/name"
            )
    _log.warning("%s is taken from the hub, or from its cache on this machine", hub_id)
    return hub_id


def find_checkpoint(name: str, wanted: str) -> str:
    """Find a folder that is here, or the id of a repository on the hub."""
    found = find_path(name, wanted)
    if isinstance(found, Path) and not found.is_dir():
        raise FileNotFoundError(f"{name!r} is not a folder; give {wanted}, or a hub id")
    return str(found)
