"""LoRA adapters of draft models: saved beside a mark of their base, and loaded onto no other."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from specdec.common.files import read_json
from specdec.common.hub import find_checkpoint
from specdec.targets.load import LOADING

_BASE_FILE = "base.json"


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor], mark: str) -> None:
    """Write an adapter in peft's own layout, with a mark of the base that it was trained on.

    Args:
        model: a peft model.
        folder: made if it is not there.
        weights: the adapter's, by their names in the model's state dict.
        mark: see `base_mark`.
    """
    model.save_pretrained(folder, state_dict=weights)
    (folder / _BASE_FILE).write_text(json.dumps({"embedding": mark}, indent=1) + "\n")


def merged_adapter(model: Any, base: Any, weights: dict[str, Tensor]) -> Any:
    """A plain model that says what an adapted one does.

    Args:
        model: the peft model; it stays as it is.
        base: its base, once more and not quantized; it is changed.
        weights: see `save_adapter`.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    plain = get_peft_model(base, model.peft_config["default"])
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model, state_dict=weights))
    return plain.merge_and_unload()


def load_adapter(model: Any, adapter: str) -> Any:
    """Put an adapter on a model.

    Args:
        model: a transformers causal LM.
        adapter: folder or hub id.

    Returns:
        The peft model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            "adapter needs the package peft; install it with: pip install 'specdec[train]'"
        ) from error
    where = find_checkpoint(adapter, "a folder with an adapter")
    folder = Path(where)
    if folder.is_dir():
        _check_base(model, folder)
    try:
        with LOADING:
            adapted = PeftModel.from_pretrained(model, where)
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"adapter {adapter!r} does not fit its base ({text}); it was trained on another model"
        ) from error
    if folder.is_dir():
        _check_names(adapted, folder)
    return adapted


def _check_base(model: Any, folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"adapter {str(folder)!r} has no adapter_config.json; give the folder of an adapter"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"adapter {str(folder)!r} has no adapter_model.safetensors; other formats are not read"
        )
    path = folder / _BASE_FILE
    if path.is_file() and read_json(path).get("embedding") != base_mark(model):
        raise ValueError(
            f"adapter {str(folder)!r} was trained on another base than this model: their "
            "embeddings differ; load it with the path of its own base"
        )


def _check_names(adapted: Any, folder: Path) -> None:
    """peft leaves out what it does not find; a part of an adapter is a wrong drafter."""
    from peft import get_peft_model_state_dict

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    odd = sorted(stored ^ set(get_peft_model_state_dict(adapted)))
    if odd:
        raise ValueError(
            f"adapter {str(folder)!r} does not fit its base: {len(odd)} tensors differ, {odd[0]} "
            "for one; it was trained on another model"
        )


def base_mark(model: Any) -> str:
    """Hash of the signs of the input embedding, which no quantization touches."""
    weight = model.get_input_embeddings().weight.detach()
    stride = max(1, weight.numel() // 2**20)
    signs = weight.reshape(-1)[::stride].signbit().cpu()
    return hashlib.sha256(signs.numpy().tobytes()).hexdigest()
