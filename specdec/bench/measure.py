"""Measuring one call of one arm: requests are served to their end, and every failure is kept."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import isfinite, nan
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from specdec.bench.config import SamplingOptions
from specdec.bench.results import Memory
from specdec.bench.workloads import Request
from specdec.common.files import first_line
from specdec.common.metrics import read_gpu
from specdec.engine.engine import Engine
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.engine.scheduler import is_out_of_memory

# What ends one request but not the run: it is counted as failed and never timed.
PROMPT_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError)
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_LOOKED_AT = ("energy_joules", "power_watts", "utilization", "memory_used_bytes")
Requests = Sequence[Request]


@dataclass(frozen=True)
class Run:
    """One request decoded once by one arm; times are seconds."""

    tokens: list[int]  # cut after the first end-of-sequence token, counted alike in all arms
    num_first: int  # tokens of the first chunk, which the decode speed leaves out
    ttft_s: float  # from the start of its own prefill to the first chunk
    decode_s: float  # from the first chunk to the last
    records: list[StepRecord] = field(default_factory=list)  # none of transformers' arms
    sent_s: float = 0.0  # after the call's start
    queue_s: float = 0.0  # from sending to the start of its prefill
    chunk_s: list[float] = field(default_factory=list)  # after the call's start
    chunk_tokens: list[int] = field(default_factory=list)
    counted: AcceptanceStats | None = None  # by a server, which keeps no records of steps

    @property
    def waited_s(self) -> float:
        """Seconds from sending to the last token: queue and prefill included."""
        return self.queue_s + self.ttft_s + self.decode_s


@dataclass(frozen=True)
class Call:
    """Requests that one arm served together."""

    rows: list[Run | str]  # in their order; the reason of one that failed
    wall_s: float | None  # prefills included; None if a request failed
    memory: Memory
    # Of the whole device, and of the process's CPU; None where they were not measured.
    energy_j: float | None = None
    gpu_busy_s: float | None = None
    gpu_memory_bytes: float | None = None  # at most
    cpu_s: float | None = None
    compile_mode: str = "eager"
    served: str | None = None  # the server that answered, in words

    @property
    def runs(self) -> list[Run]:
        return [row for row in self.rows if isinstance(row, Run)]


class Arm(Protocol):
    """Decodes the requests of a call, each to a run or to the reason why it failed."""

    cache_bytes: int | None  # largest keys and values of the last call, where they are known
    compile_mode: str  # of the last call

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]: ...


def measure_call(arm: Arm, requests: Requests, device: torch.device, meter: "PowerMeter") -> Call:
    reset_peaks(device)
    meter.start()
    started = time.perf_counter()
    rows = decode_healthy(lambda given: arm(given, meter.look), requests)
    took_s = time.perf_counter() - started
    used = meter.stop()
    is_whole = all(isinstance(row, Run) for row in rows)
    memory = read_peaks(device, arm.cache_bytes)
    wall_s = took_s if is_whole else None
    return Call(rows, wall_s, memory, compile_mode=arm.compile_mode, **used)


# --- Serving ---


def serve(
    engine: Engine,
    requests: Requests,
    sampling: SamplingOptions,
    after_step: Callable[[], None] = lambda: None,
) -> list[Run | str]:
    """Serve every request to its end: a run for each, or the reason why it failed.

    A request with a time of arrival counts as sent then, even if the engine was in the middle of a
    step: its user waits for that too. `after_step` is called outside of what a step measures.
    """
    waiting = list(range(len(requests)))
    busy: set[int] = set()  # users whose request is on its way
    live: dict[int, tuple[int, Run]] = {}  # number in the engine -> place, and what came so far
    rows: dict[int, Run | str] = {}
    started = time.perf_counter()
    while waiting or live:
        now_s = time.perf_counter() - started
        for place in tuple(waiting):
            one = requests[place]
            if one.user in busy if one.arrival_s is None else one.arrival_s > now_s:
                continue
            waiting.remove(place)
            busy.add(one.user)
            sent_s = now_s if one.arrival_s is None else one.arrival_s
            index = engine.submit(
                one.prompt, sampling.with_seed(one.seed), max_new_tokens=one.max_new_tokens
            )
            live[index] = place, Run([], 0, 0.0, 0.0, sent_s=sent_s, queue_s=now_s - sent_s)
        if not live:
            first_s = min(requests[place].arrival_s or 0.0 for place in waiting)
            time.sleep(max(0.0, first_s - now_s))
            continue
        chunks = engine.advance()
        now_s = time.perf_counter() - started
        for chunk in chunks:
            place, run = live[chunk.index]
            if chunk.tokens:
                run.chunk_s.append(now_s)
                run.chunk_tokens.append(len(chunk.tokens))
            if chunk.finish_reason:
                del live[chunk.index]
                busy.discard(requests[place].user)
                result = engine.result(chunk.index)
                rows[place] = result.error or replace(
                    run,
                    tokens=result.tokens,
                    num_first=run.chunk_tokens[0],
                    queue_s=run.queue_s + result.queue_s,
                    ttft_s=result.ttft_s,
                    decode_s=result.decode_s,
                    records=result.records,
                )
        after_step()
    return [rows[place] for place in range(len(requests))]


# --- Failures ---

Decode = Callable[[Requests], list[Run | str]]


def decode_healthy(decode: Decode, requests: Requests) -> list[Run | str]:
    """Decode requests; where some make the call fail, the others are decoded without them."""
    rows, reason, out_of_memory = _try(decode, requests)
    if rows is not None:
        return rows
    users = {request.user for request in requests}
    if len(requests) == 1 or len(users) < len(requests):
        return [reason] * len(requests)  # a user's requests follow each other
    if out_of_memory:
        return [f"{reason}; {_largest_batch(decode, requests)}"] * len(requests)
    alone = [_try(decode, [request]) for request in requests]
    healthy = [request for request, one in zip(requests, alone, strict=True) if one[0] is not None]
    if len(healthy) == len(requests):
        return [reason] * len(requests)  # only together do they fail
    again = iter(decode_healthy(decode, healthy) if healthy else [])
    return [why if found is None else next(again) for found, why, _ in alone]


def _try(decode: Decode, requests: Requests) -> tuple[list[Run | str] | None, str, bool]:
    """The rows, or None with the reason and whether memory ran out."""
    try:
        return decode(requests), "", False
    except PROMPT_ERRORS as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        out_of_memory = is_out_of_memory(error)
    # Only here is the error gone, and with it the frames that hold the batch's tensors.
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason, out_of_memory


def _largest_batch(decode: Decode, requests: Requests) -> str:
    """The largest batch that does decode, found by halving, with the longest prompts in it."""
    longest = sorted(requests, key=lambda request: -request.num_tokens)
    size = len(requests) // 2
    while size:
        if _try(decode, longest[:size])[0] is not None:
            return f"{size} of these prompts fit together, set batch_size={size}"
        size //= 2
    return "one prompt alone does not fit, lower max_new_tokens or use a smaller target.dtype"


# --- Memory and power ---


def reset_peaks(device: torch.device) -> None:
    """Begin to watch memory; only Linux lets a process set its peak back to the call's own."""
    with suppress(OSError):
        _RESET.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peaks(device: torch.device, cache_bytes: int | None) -> Memory:
    """Peaks since `reset_peaks`, with what the arm says of its caches."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    is_cuda = device.type == "cuda"
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    kib = kib or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]  # bytes on a Mac
    return Memory(
        peak_rss_bytes=kib[0] * (1 if sys.platform == "darwin" else 1024),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if is_cuda else None,
        cache_bytes=cache_bytes,
    )


class PowerMeter:
    """The use of one device from `start` to `stop`, other processes on it included, and of the CPU.

    Energy is the difference of NVML's counter where the GPU has one (Volta and later), else the
    power of all looks, summed up. Without a CUDA device, or without the package nvidia-ml-py
    (module pynvml), nothing is measured but the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._uuid = ""
        if device.type == "cuda" and find_spec("pynvml"):
            # CUDA_VISIBLE_DEVICES renumbers torch's devices alone.
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
            self._uuid = f"GPU-{uuid}"

    def start(self) -> None:
        self._cpu_s = time.process_time()
        self._looks: list[tuple[float, ...]] = []
        self.look()

    def look(self, every_s: float = 0.1) -> None:
        """Take in the figures of now, where the last look is some time ago."""
        now = time.perf_counter()
        if self._uuid and not (self._looks and now < self._looks[-1][0] + every_s):
            found = read_gpu(self._uuid)
            self._looks.append((now, *(found.get(figure, nan) for figure in _LOOKED_AT)))

    def stop(self) -> dict[str, Any]:
        """Give the figures of a `Call` since the start; None where nothing was measured."""
        self.look(every_s=0)
        seconds, energy, power, use, memory = np.array(self._looks or [(nan,) * 5] * 2).T
        joules = energy[-1] - energy[0]
        found = {
            "energy_j": joules if isfinite(joules) else np.trapezoid(power, seconds),
            "gpu_busy_s": np.trapezoid(use, seconds),
            "gpu_memory_bytes": memory.max(),
            "cpu_s": time.process_time() - self._cpu_s,
        }
        return {name: float(each) if isfinite(each) else None for name, each in found.items()}
