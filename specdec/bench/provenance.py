"""Where a number comes from: everything needed to repeat or doubt it."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specdec.bench.config import BenchConfig
from specdec.bench.prompt import BenchPrompt
from specdec.provenance import code
from specdec.targets.hf import HFTarget

_PACKAGES = ("specdec", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


def fingerprint(config: BenchConfig, prompts: Sequence[BenchPrompt]) -> str:
    """A short hash of configuration and prompts: a folder of results belongs to one."""
    whole = {"config": asdict(config), "prompts": [asdict(prompt) for prompt in prompts]}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_of_ids(ids: Sequence[int]) -> str:
    """A short hash of a prompt as the target reads it."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def collect(
    config: BenchConfig, mark: str, target: HFTarget, num_processes: int = 1
) -> dict[str, Any]:
    """Configuration of a bench with its fingerprint, and where it ran."""
    return {
        "config": asdict(config),
        "config_fingerprint": mark,
        "processes": num_processes,
        **machine(target),
    }


def joined(num_processes: int) -> dict[str, Any]:
    """Where a joined file comes from; each of its runs tells of its own machine."""
    return {"processes": num_processes, **code(_PACKAGES)}


def machine(target: Any) -> dict[str, Any]:
    """Command, commit, versions, machine and time of any measurement.

    Args:
        target: an `HFTarget`, or another with its `device` and `model`.
    """
    return {
        **code(_PACKAGES),
        "device": _device_name(target.device),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "quantized": bool(getattr(target.model, "is_quantized", False)),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
