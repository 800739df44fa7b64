"""The files of a checkpoint: where they are, how they are read, and how they get there whole."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from specdec.common.files import read_json
from specdec.common.hub import find_checkpoint

CONFIG, SIDECAR = "config.json", "specdec.json"
WEIGHT_FILES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
)

_DAMAGE = (SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)


@dataclass(frozen=True, eq=False)
class RawFiles:
    """The files of a layout other than our own.

    Attributes:
        folder: for messages.
        config: content of `config.json`; empty if there is none.
        weights: name of the file with the tensors.
        tensors: under the layout's names.
    """

    folder: str
    config: dict[str, Any]
    weights: str
    tensors: dict[str, Tensor]

    @property
    def config_path(self) -> str:
        """For messages."""
        return f"{self.folder}/{CONFIG}"

    @property
    def weights_path(self) -> str:
        """For messages."""
        return f"{self.folder}/{self.weights}"


def read_raw(folder: Path) -> RawFiles:
    """Read the files of a layout other than our own."""
    found = [name for name in WEIGHT_FILES if (folder / name).exists()]
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no draft head: none of {', '.join(WEIGHT_FILES)} is there"
            f"{_seen(config)}"
        )
    # The same head is often published twice; a Medusa head may lie beside its target's weights.
    weights = next((name for name in found if name.startswith("medusa")), found[0])
    return RawFiles(str(folder), config, weights, read_tensors(folder / weights))


def _seen(config: dict[str, Any]) -> str:
    """Words for a folder that holds another model."""
    layers = config.get("num_hidden_layers")
    return f"; its config.json is that of a model of {layers} layers" if layers else ""


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if the path is a hub id."""
    found = find_checkpoint(str(path), "a folder with a head's checkpoint")
    return Path(found) if Path(found).is_dir() else _download(found, revision)


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
    # A published EAGLE-3 config counts its target's layers, and some Medusa heads their target's.
    is_head = {"draft_vocab_size", "medusa_num_heads"} & config.keys()
    if isinstance(layers, int) and layers > 1 and not is_head:
        raise ValueError(
            f"{name!r} is a model of {layers} layers, not a draft head; its weights were not "
            "downloaded"
        )
    return fetch(*WEIGHT_FILES)


def size_on_disk(folder: Path) -> int:
    """Bytes of the files that make a checkpoint, and no others of the folder."""
    paths = (folder / name for name in (CONFIG, SIDECAR, *WEIGHT_FILES))
    return sum(path.stat().st_size for path in paths if path.exists())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file, which is never unpickled as objects."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    except OSError as error:
        if error.errno != EINVAL:  # torch's answer to a file that was cut off
            raise
        raise _unreadable(path, error) from error
    named = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not named:
        raise ValueError(f"{str(path)!r} must hold named tensors and nothing else")
    # Tensors of a torch file may share memory, which safetensors cannot hold.
    is_shared = path.suffix != ".safetensors"
    return {str(name): t.detach().clone() if is_shared else t for name, t in content.items()}


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{str(path)!r} cannot be read ({reason}); it is corrupt or truncated, copy or download "
        "it again"
    )


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of most of the weights, as configs spell it."""
    dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.ndim == 2]
    return max(set(dtypes), key=dtypes.count)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON object as the text of a file, a list of numbers on one line."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"options and training must be JSON values: {error}") from error
    # A text in JSON holds no line break, so that none is touched.
    flat = re.sub(r"\[\n[^][{}\"]*\]", lambda found: json.dumps(json.loads(found[0])), text)
    return flat.encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors in the safetensors format, each in its dtype and with memory of its own."""
    seen: set[int] = set()
    whole = {}
    for name, tensor in tensors.items():
        each = tensor.detach().cpu().contiguous()
        place = each.untyped_storage().data_ptr()
        whole[name] = each.clone() if place in seen else each
        seen.add(place)
    return save(whole, {"format": "pt"})
