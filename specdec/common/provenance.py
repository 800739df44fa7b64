"""Provenance of measurements: the code that made a file, and the machine it ran on."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from specdec.common.compile import compile_s, compiler
from specdec.common.distribution import DISTRIBUTION, installed_version

PACKAGES = ("specdec", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


class CodeProvenance(BaseModel, extra="forbid"):
    """Command, commit, versions and time of a file; the fields of `code`."""

    command: str
    git_commit: str | None
    git_dirty: bool
    versions: dict[str, str]
    date: str


class MachineProvenance(CodeProvenance):
    """Provenance of a measurement, with its machine; the fields of `machine`."""

    device: str
    cpu: str
    cpu_count: int
    threads: int
    load_average: float
    dtype: str
    quantized: bool
    omp_wait_policy: str | None = None
    compile_mode: str = "eager"
    compiler: str | None = None
    compile_s: float | None = None

    @property
    def alarms(self) -> list[str]:
        """Notes without which speeds of this machine mislead."""
        return is_loaded(self.load_average, self.cpu_count)

    @property
    def notes(self) -> list[str]:
        """Facts that a reader has to know before any time of this machine."""
        found = waits_passively(self.device, self.threads, self.omp_wait_policy)
        found += self.alarms
        if self.compile_mode != "eager":
            by = f"{self.compile_mode}, {self.compiler or 'no C++ compiler'}"
            found.append(
                f"compiled ({by}); {self.compile_s or 0:.0f} s of compilation are in no timed call"
            )
        return found


def code(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Command, commit, versions of these packages, and time."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), **versions(packages)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions by names of imports, which only this package's own differs from."""
    names = {"specdec": DISTRIBUTION}
    return {package: installed_version(names.get(package, package)) for package in packages}


def waits_passively(device: str, threads: int, policy: str | None) -> list[str]:
    """Warn of threads that sleep between the parallel parts of a forward."""
    if device != "cpu" or threads < 2 or (policy or "").strip().lower() != "passive":
        return []
    return [
        "OMP_WAIT_POLICY is passive: on a CPU a forward of two tokens or more takes about twice as "
        "long, which slows drafting and verification more than plain decoding; unset it"
    ]


def is_loaded(load_average: float, cpu_count: int) -> list[str]:
    """Warn of other work on the cores; one's own threads are a part of the load as well."""
    if load_average <= max(1.0, 1.25 * cpu_count):
        return []
    return [f"load {load_average:.1f} on {cpu_count} cores: speeds are not trustworthy"]


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that holds the package; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(target: Any) -> dict[str, Any]:
    """Command, commit, versions, machine and time of a measurement with an `HFTarget`."""
    device, info = target.device, Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    mode = getattr(target, "compile_mode", "eager")  # other engines have none
    return {
        **code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpus[0] if cpus else platform.processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "quantized": bool(getattr(target.model, "is_quantized", False)),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "compile_mode": mode,
        "compiler": None if mode == "eager" else compiler(),
        "compile_s": None if mode == "eager" else compile_s(),
    }
