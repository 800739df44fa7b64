"""The files of a checkpoint: where they are, and how they are read and made."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
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


def own_mtp(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Names of those tensors of a target, by its text config, that make its MTP layers."""
    first, num = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    prefixes = ["mtp."]
    if isinstance(first, int) and isinstance(num, int):
        prefixes += [f"model.layers.{layer}." for layer in range(first, first + num)]
    return [name for name in names if name.startswith(tuple(prefixes))]


def _own_files(folder: Path) -> dict[str, str]:
    """The files that hold each tensor of a target's MTP layers; none is read for it."""
    files: dict[str, str] = {}
    if (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map") or {}
    elif (whole := folder / WEIGHT_FILES[0]).exists():
        with suppress(SafetensorError), safe_open(whole, "pt") as opened:  # told when it is read
            files = dict.fromkeys(opened.keys(), whole.name)
    return {name: files[name] for name in own_mtp(files, _text(_read_config(folder)))}


def own_folder(target: str, revision: str | None) -> str:
    """Find the folder of a target that ships MTP layers."""
    with suppress(ValueError, FileNotFoundError):
        if _own_files(folder := find_folder(target, revision)):
            return str(folder)
    raise ValueError(
        f"drafter 'mtp' needs the option 'path': the target {target!r} ships no MTP layer; train "
        "one (recipes/mtp.yaml), or give its folder or hub id"
    )


def read_raw(folder: Path) -> RawFiles:
    found = [name for name in WEIGHT_FILES if (folder / name).exists()]
    config = _read_config(folder)
    if own := _own_files(folder):
        tensors = dict[str, Tensor]()
        for file in sorted(set(own.values())):
            names = [name for name, place in own.items() if place == file]
            tensors |= read_tensors(folder / file, names)
        return RawFiles(str(folder / CONFIG), str(folder / file), _text(config), tensors)
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


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that a target's text model has."""
    return config.get("text_config") or config


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """Find a checkpoint's folder; of a hub id it is downloaded, weights only if it is a head.

    Of a target that ships MTP layers, the files that hold these.
    """
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

    place = fetch(CONFIG, SIDECAR, INDEX)
    config = _text(_read_config(place))
    layers = config.get("num_hidden_layers", 1)
    # A block head has several, and published EAGLE-3 and Medusa configs count their targets'.
    is_head = {"draft_vocab_size", "medusa_num_heads", "block_size"} & config.keys()
    if isinstance(layers, int) and layers > 1 and not is_head:
        if own := set(_own_files(place).values()):
            return fetch(*own)
        told = config.get("num_nextn_predict_layers") or config.get("mtp_num_hidden_layers")
        if told and not (place / INDEX).exists():
            return fetch(WEIGHT_FILES[0])
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


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, or these of it, one in shards, or a torch file.

    Nothing is unpickled as an object.
    """
    if path.name == INDEX:
        return _read_shards(path)
    try:
        if names is not None:
            with safe_open(path, "pt") as opened:
                return {name: opened.get_tensor(name) for name in names}
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
