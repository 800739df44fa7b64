"""The files of a checkpoint: where they are, and how they are read and made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from specdec.common.config import Config, validated
from specdec.common.files import first_line, read_json
from specdec.common.hub import find_checkpoint

CONFIG, SIDECAR = "config.json", "specdec.json"
INDEX, SHARDS = "model.safetensors.index.json", "model-*.safetensors"
WEIGHT_FILES = (
    *("model.safetensors", INDEX, "pytorch_model.bin"),
    *("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
)


@dataclass(frozen=True, eq=False)
class RawFiles:
    """The files of a layout of the field, tensors under its names."""

    config_path: str
    weights_path: str
    config: dict[str, Any]  # empty if there is none
    tensors: dict[str, Tensor]


def read_raw(folder: Path) -> RawFiles:
    found = [name for name in WEIGHT_FILES if (folder / name).exists()]
    config = _read_config(folder)
    if not found:
        layers = config.get("num_hidden_layers")
        other = f", but the config of a model of {layers} layers" if layers else ""
        raise FileNotFoundError(
            f"{str(folder)!r} holds no draft head: none of {', '.join(WEIGHT_FILES)}{other}"
        )
    # The same head is often published twice; a Medusa head may lie beside its target's weights.
    weights = folder / next((name for name in found if name.startswith("medusa")), found[0])
    return RawFiles(str(folder / CONFIG), str(weights), config, read_tensors(weights))


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """Find a checkpoint's folder; of a hub id it is downloaded, weights only if it is a head."""
    name = find_checkpoint(str(path), "a folder with a head's checkpoint")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:
            raise FileNotFoundError(
                f"{name!r} is no folder here and could not be had from the hub: {first_line(error)}"
            ) from error

    config = _read_config(fetch(CONFIG, SIDECAR))
    layers = config.get("num_hidden_layers", 1)
    # A published EAGLE-3 config counts its target's layers, and some Medusa heads their target's.
    is_head = {"draft_vocab_size", "medusa_num_heads"} & config.keys()
    if isinstance(layers, int) and layers > 1 and not is_head:
        raise ValueError(
            f"{name!r} is a model of {layers} layers, no head; weights were not downloaded"
        )
    return fetch(*WEIGHT_FILES, SHARDS)


def size_on_disk(folder: Path) -> int:
    """Count the bytes of the files that make a checkpoint, and no others of the folder."""
    names = (CONFIG, SIDECAR, *WEIGHT_FILES, SHARDS)
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


def unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"{str(path)!r} cannot be read ({first_line(error)}); it is corrupt or truncated, copy or "
        "download it again"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, one in shards, or a torch file, never unpickled as objects."""
    if path.name == INDEX:
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError, OSError) as error:
        if isinstance(error, OSError) and error.errno != EINVAL:  # torch's for a file cut off
            raise
        raise unreadable(path, error) from error
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{str(path)!r} must hold named tensors and nothing else")
    # They may share memory, which safetensors cannot hold.
    return {str(name): tensor.detach().clone() for name, tensor in content.items()}


class _Index(Config):
    model_config = ConfigDict(extra="ignore")
    weight_map: dict[str, str]  # tensor -> its shard


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the shards that an index names: all of them, with the tensors it says, and no others."""
    wanted, tensors = (
        validated(_Index, read_json(index), repr(str(index))).weight_map,
        dict[str, Tensor](),
    )
    there = {path.name for path in index.parent.glob(SHARDS)}
    for shard in sorted({*wanted.values()} ^ there):
        fault = "is not one of the shards" if shard in there else "is missing among the shards"
        raise ValueError(
            f"{str(index.parent / shard)!r} {fault} that {INDEX} names; copy all again"
        )
    for shard in sorted(there):
        found = read_tensors(index.parent / shard)
        if other := sorted(found.keys() ^ {name for name, at in wanted.items() if at == shard}):
            told = "holds" if other[0] in found else "lacks"
            raise ValueError(
                f"{str(index.parent / shard)!r} {told} the tensor {other[0]}, against {INDEX}; "
                "copy all shards again"
            )
        tensors |= found
    return tensors


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Make a JSON file, a list of numbers on one line."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"options and training must be JSON values: {error}") from error
    # A text in JSON holds no line break, so that none is touched.
    flat = re.sub(r"\[\n[^][{}\"]*\]", lambda found: json.dumps(json.loads(found[0])), text)
    return flat.encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Make a safetensors file, each tensor in its dtype and with memory of its own."""
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(own, {"format": "pt"})
