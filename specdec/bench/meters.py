"""Meters of a call: peak memory, and the energy of a CUDA device."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from specdec.bench.store import Peaks

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


def reset_peaks(device: torch.device) -> None:
    """Begin to watch memory.

    Linux lets a process set its peak back, so that the peak is the call's own; elsewhere it is
    the process's so far.
    """
    with suppress(OSError):
        _RESET.write_text(_RESET_PEAK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB everywhere else


def read_peaks(device: torch.device, cache_bytes: int | None) -> Peaks:
    """Peaks since `reset_peaks`, with what the arm says of its caches."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Peaks(1024 * kib[0] if kib else peak_rss_bytes(), peak, cache_bytes)


class PowerMeter:
    """The energy of one device from `start` to `stop`, other processes on it included.

    NVML's energy counter is read where the GPU has one (Volta and later); else its power is read
    at every `look`, and summed up. Without a CUDA device, or without the package nvidia-ml-py
    (module pynvml), nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = _open(device)
        self._handle = _handle(self._nvml, device)
        self._has_counter = self._counter_j() is not None
        self.start()

    def start(self) -> None:
        """Begin a call."""
        self._last_s = time.perf_counter()
        self._first_j = self._counter_j()
        self._last_w = None if self._has_counter else self._power_w()
        self._sum_j = 0.0

    def look(self) -> None:
        """Take in the power now; needed only where there is no counter."""
        if self._has_counter or self._last_w is None:
            return
        now_s, power_w = time.perf_counter(), self._power_w()
        if power_w is not None:
            # Trapezoids: the power between two looks is about their mean.
            self._sum_j += (now_s - self._last_s) * (self._last_w + power_w) / 2
            self._last_s, self._last_w = now_s, power_w

    def stop(self) -> float | None:
        """Joules since the start; None where nothing was measured."""
        self.look()
        if self._first_j is None:
            return None if self._last_w is None else self._sum_j
        last_j = self._counter_j()
        return None if last_j is None else last_j - self._first_j

    def _counter_j(self) -> float | None:
        return self._read("nvmlDeviceGetTotalEnergyConsumption")  # millijoules

    def _power_w(self) -> float | None:
        return self._read("nvmlDeviceGetPowerUsage")  # milliwatts

    def _read(self, name: str) -> float | None:
        """A thousandth of what NVML says; None where it does not."""
        if self._nvml is None or self._handle is None:
            return None
        try:
            return float(getattr(self._nvml, name)(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None


def _open(device: torch.device) -> ModuleType | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _handle(nvml: Any, device: torch.device) -> Any:
    """The device in NVML, by its UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices alone."""
    if nvml is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except nvml.NVMLError:
        return None
