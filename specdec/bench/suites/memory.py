"""Memory of one call: of the process, of the device and of the target's cache."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from specdec.bench.outcome import Memory
from specdec.targets.memory import peak_rss_bytes

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


class MemoryWatch:
    """Watches from its creation on; call `look` after every step.

    Linux lets a process set its peak back, so that the peak is the call's own; elsewhere it is
    the process's so far.

    Args:
        target: whose cache is watched, and on whose device.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._cache_bytes: int | None = None
        with suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
        if target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target.device)

    def look(self) -> None:
        """Take in how large the cache is now."""
        cache = getattr(self._target, "cache", None)
        if cache is not None:
            self._cache_bytes = max(self._cache_bytes or 0, cache.num_bytes)

    def memory(self) -> Memory:
        """The peaks since the start."""
        device = self._target.device
        on_cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
        return Memory(_peak_rss_bytes(), peak, self._cache_bytes)


def _peak_rss_bytes() -> int:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * kib[0] if kib else peak_rss_bytes()
