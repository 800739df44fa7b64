"""The files of a checkpoint: where they are, how they are read, and how they get there whole."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

CONFIG, SIDECAR = "config.json", "specdec.json"
WEIGHT_FILES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
)


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if the path is a hub id.

    Args:
        path: folder, `~` for the home folder; or a hub id.
        revision: of a hub id.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
    """
    text = str(path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or folder.exists():
        raise FileNotFoundError(
            f"{text!r} is not a folder; give a folder with a head's checkpoint, or a hub id "
            "'owner/name'"
        )
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    """Descriptions first: weights are only fetched of what is small enough to be a head."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileNotFoundError(
                f"{name!r} is no folder here and could not be had from the hub: {reason}"
            ) from error

    folder = fetch(CONFIG, SIDECAR)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    layers = config.get("num_hidden_layers", 1)
    if isinstance(layers, int) and layers > 1 and "medusa_num_heads" not in config:
        raise ValueError(
            f"{name!r} is a model of {layers} layers, not a draft head; nothing was downloaded"
        )
    return fetch(*WEIGHT_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path.parent)!r} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON ({error}); it is corrupt or truncated, copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, it must hold an object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file, which is never unpickled as objects.

    Raises:
        ValueError: it is corrupt, or holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{str(path)!r} cannot be read ({reason}); it is corrupt or truncated, copy or "
            "download it again"
        ) from error
    named = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not named:
        raise ValueError(f"{str(path)!r} must hold named tensors and nothing else")
    return {str(name): tensor for name, tensor in content.items()}


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON object as the text of a file.

    Raises:
        ValueError: a value that JSON cannot hold, such as NaN.
    """
    try:
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"options and training must be JSON values: {error}") from error


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors in the safetensors format, each in its dtype."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(whole, {"format": "pt"})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files under other names first, so that a crash leaves old ones or new ones whole.

    Args:
        folder: made if it is not there.
        files: name -> content, in the order in which they appear.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial" for name in files}
    try:
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
