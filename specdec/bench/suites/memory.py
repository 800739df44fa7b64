"""Memory of one call: of the process and of the device."""

from contextlib import suppress
from pathlib import Path

import torch

from specdec.bench.outcome import Memory
from specdec.targets.memory import peak_rss_bytes

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


class MemoryWatch:
    """Watches from its creation on.

    Linux lets a process set its peak back, so that the peak is the call's own; elsewhere it is
    the process's so far.

    Args:
        device: of the target.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def memory(self, cache_bytes: int) -> Memory:
        """The peaks since the start, with what the engine says of its caches."""
        on_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else None
        return Memory(_peak_rss_bytes(), peak, cache_bytes)


def _peak_rss_bytes() -> int:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * kib[0] if kib else peak_rss_bytes()
