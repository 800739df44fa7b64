"""A name is a path here or an id on the hub; a misspelt path must not become a download."""

import logging
import os
import re
from functools import cache
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
# A card's name for the folder that it lies in, until the folder has one on the hub.
HERE = "PATH/OF/THIS/FOLDER"
_PUBLISHED = {".safetensors", ".json", ".jinja", ".md", ".model", ".txt"}
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
    _say(hub_id)
    return hub_id


@cache
def _say(hub_id: str) -> None:
    """Say it once, however many files are asked for."""
    _log.warning("%s is taken from the hub, or from its cache on this machine", hub_id)


def find_checkpoint(name: str, wanted: str) -> str:
    """Find a folder that is here, or the id of a repository on the hub."""
    found = find_path(name, wanted)
    if isinstance(found, Path) and not found.is_dir():
        raise FileNotFoundError(f"{name!r} is not a folder; give {wanted}, or a hub id")
    return str(found)


def push(
    folder: Path, name: str, message: str, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload a drafter to a repository, made if it is not there; returns the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    hub_id = name.removeprefix(HUB)
    if not _ID.fullmatch(hub_id) or "/" not in hub_id:
        raise ValueError(f"{name!r} is no id of the hub; write owner/name")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in _PUBLISHED]
    if not any(path.suffix == ".safetensors" for path in paths):
        raise ValueError(
            f"{str(folder)!r} holds no safetensors; give the folder of a drafter, as specdec train "
            "or specdec export writes it"
        )
    files = []
    for path in paths:
        content: bytes | str = str(path)
        if path.name == "README.md":  # its commands run as they stand
            content = path.read_text().replace(HERE, hub_id).encode()
        files.append(CommitOperationAdd(str(path.relative_to(folder)), content))
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        done = api.create_commit(hub_id, files, commit_message=message, revision=revision)
    except Exception as error:  # of the network, of the server and of its client
        raise RuntimeError(
            f"{hub_id} could not be written ({str(error).strip().splitlines()[0]}); log in with "
            "hf auth login, or set HF_TOKEN, with a token that may write there"
        ) from error
    return str(done.commit_url)
