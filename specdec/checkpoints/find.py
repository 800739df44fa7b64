"""Drafters that are named in any way: by type, JSON, folder, hub id or as an embedded one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec.checkpoints.head import HeadCheckpoint
from specdec.checkpoints.layouts import read_head
from specdec.common.arguments import merged
from specdec.common.files import read_json
from specdec.common.hub import find_path
from specdec.demo import unpacked
from specdec.registry import DRAFTERS, drafter_options, is_kind, strategy


def find_drafter(
    drafter: str | Mapping[str, Any], revision: str | None = None
) -> tuple[dict[str, Any], HeadCheckpoint | None]:
    """Find the options of a drafter that is named in any way, and its head if it has one."""
    if isinstance(drafter, str):
        is_typed = drafter.startswith("{") or is_kind(drafter)
        drafter = drafter_options(drafter) if is_typed else {"path": drafter}
    drafter = merged(drafter)
    kind, path = drafter.get("type"), str(drafter.get("path") or "demo")
    if kind and not strategy(kind, typed=True).trained_as:
        return dict(drafter), None
    if path == "demo" and kind and kind not in DRAFTERS:
        raise ValueError(f"drafter {kind!r} needs the option 'path'; give a folder or hub id")
    if path == "demo":
        path = f"demo/{str(kind).removesuffix('_model')}"
    path = unpacked(path)
    options, folder = {**drafter, "path": path}, Path(path).expanduser()
    if kind is None and (adapter := _adapter_config(path, revision)):
        base = read_json(adapter)["base_model_name_or_path"]
        return {"type": "draft_model", "path": base, "adapter": path}, None
    # A head has no tokenizer of its own; Medusa's may lie beside its target.
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    is_model = has_tokenizer and not any(folder.glob("medusa_lm_head.*"))
    if strategy(kind).head_class if kind else not is_model:  # a target may ship a head too
        try:
            head = read_head(path, revision)
            return {**options, "type": head.kind}, head
        except ValueError as error:
            if kind or folder.is_dir() or "no head" not in str(error):
                raise
    return {"type": "draft_model", **options}, None


def _adapter_config(path: str, revision: str | None) -> Path | None:
    """Find the config of an adapter in a folder or on the hub; None for anything else."""
    if Path(path).expanduser().is_dir():
        file = Path(path).expanduser() / "adapter_config.json"
        return file if file.is_file() else None
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(str(find_path(path, "a folder")), revision=revision)
    return Path(found) if found else None
