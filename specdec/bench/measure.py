"""Decode some prompts with one arm, and keep what can be kept when something goes wrong."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from specdec.bench.arms import Arm, load_draft_length
from specdec.bench.config import ConcurrentConfig, SuiteConfig
from specdec.bench.store import Memory, Outcome, Run
from specdec.bench.suites.store import Call, Power, Served
from specdec.bench.workloads import Ask, Group
from specdec.engine.engine import Engine
from specdec.engine.interfaces import Drafter
from specdec.engine.request import Result
from specdec.engine.scheduler import is_out_of_memory
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import peak_rss_bytes

# What ends one prompt but not the run: it is counted as failed and never timed.
PROMPT_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError)

Prompts = Sequence[list[int]]


def decode_call(
    arm: Arm, prompts: Prompts, indices: Sequence[int], device: torch.device
) -> Outcome:
    """Decode prompts; those that fail are found, left out, and the others decoded without them.

    Args:
        arm: decodes them.
        prompts: token ids.
        indices: of the prompts in the whole bench, which their seeds follow.
        device: of the target.

    Returns:
        A run or a reason for each prompt.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    rows = _rows(arm, prompts, indices)
    took = time.perf_counter() - started
    wall_s = None if any(isinstance(row, str) for row in rows) else took
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return Outcome(rows, wall_s, Memory(peak_rss_bytes(), peak, arm.cache_bytes))


def _rows(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> list[Run | str]:
    rows, reason, out_of_memory = _try(arm, prompts, indices)
    if rows is not None:
        return list(rows)
    if out_of_memory:
        return [f"{reason}; {_what_fits(arm, prompts, indices)}"] * len(prompts)
    if len(prompts) == 1:
        return [reason]
    alone = [_try(arm, [prompt], [i])[:2] for prompt, i in zip(prompts, indices, strict=True)]
    healthy = [place for place, (found, _) in enumerate(alone) if found is not None]
    if len(healthy) == len(prompts):
        return [reason] * len(prompts)  # only together do they fail
    again = (
        _rows(arm, [prompts[p] for p in healthy], [indices[p] for p in healthy]) if healthy else []
    )
    kept = dict(zip(healthy, again, strict=True))
    return [kept.get(place, why) for place, (_, why) in enumerate(alone)]


def _try(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> tuple[list[Run] | None, str, bool]:
    """The runs, or None with the reason and whether memory ran out."""
    try:
        return arm(prompts, indices), "", False
    except PROMPT_ERRORS as error:
        first_line = (str(error).splitlines() or ["no message"])[0]
        reason, out_of_memory = f"{type(error).__name__}: {first_line}", is_out_of_memory(error)
    # Only here is the error gone, and with it the frames that hold the batch's tensors.
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason, out_of_memory


def _what_fits(arm: Arm, prompts: Prompts, indices: Sequence[int]) -> str:
    """The largest batch that does decode, found by halving, with the longest prompts in it."""
    longest = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    size = len(prompts) // 2
    while size:
        chosen = longest[:size]
        if _try(arm, [prompts[p] for p in chosen], [indices[p] for p in chosen])[0] is not None:
            return f"{size} of these prompts fit together, set batch_size={size}"
        size //= 2
    return "one prompt alone does not fit, lower max_new_tokens or use a smaller target.dtype"


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


class PowerMeter:
    """The energy of one device from `start` to `stop`, other processes on it included.

    NVML's energy counter is read where the GPU has one (Volta and later); else its power is read
    at every `look`, and summed up. Without a CUDA device, or without the package nvidia-ml-py
    (module pynvml), nothing is measured.

    Args:
        device: of the target.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = _open(device)
        self._handle = _handle(self._nvml, device)
        self._has_counter = self._counter_j() is not None
        self.start()

    @property
    def is_measuring(self) -> bool:
        """Whether there is a device whose power can be read."""
        return self._has_counter or self._power_w() is not None

    def start(self) -> None:
        """Begin a call."""
        self._started = self._last = time.perf_counter()
        self._first_j = self._counter_j()
        self._last_w = None if self._has_counter else self._power_w()
        self._sum_j = 0.0

    def look(self) -> None:
        """Take in the power now; needed only where there is no counter."""
        if self._has_counter or self._last_w is None:
            return
        now, power_w = time.perf_counter(), self._power_w()
        if power_w is not None:
            # Trapezoids: the power between two looks is about their mean.
            self._sum_j += (now - self._last) * (self._last_w + power_w) / 2
            self._last, self._last_w = now, power_w

    def stop(self) -> Power:
        """What was drawn since the start."""
        self.look()
        seconds = time.perf_counter() - self._started
        energy_j = self._energy_j()
        if energy_j is None or seconds <= 0:
            return Power()
        return Power(energy_j, energy_j / seconds)

    def _energy_j(self) -> float | None:
        if self._first_j is not None:
            last_j = self._counter_j()
            return None if last_j is None else last_j - self._first_j
        return None if self._last_w is None else self._sum_j

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


@dataclass
class _Live:
    """A request on its way: its place in the call, and what came so far."""

    place: int
    sent_s: float
    late_s: float
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)

    def served(self, result: Result) -> Served | str:
        if result.finish_reason == "error":
            return result.error
        queue_s = self.late_s + result.queue_s
        return Served(
            result.tokens, self.sent_s, queue_s, self.chunk_s, self.chunk_tokens, result.records
        )


class _Users:
    """Who sends what next: at its time of arrival, or when the one before is answered."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = asks
        self._queues: dict[int, deque[int]] = {}
        for place, ask in enumerate(asks):
            self._queues.setdefault(ask.user, deque()).append(place)
        self._busy: set[int] = set()

    @property
    def are_done(self) -> bool:
        return not any(self._queues.values())

    def due(self, now_s: float) -> list[int]:
        """Places of the requests to send now, in the order of the call; they count as sent."""
        found = []
        for user, queue in self._queues.items():
            while queue and self._is_due(self._asks[queue[0]], now_s):
                found.append(queue.popleft())
                self._busy.add(user)
        return sorted(found)

    def _is_due(self, ask: Ask, now_s: float) -> bool:
        return ask.user not in self._busy if ask.arrival_s is None else ask.arrival_s <= now_s

    def answer(self, place: int) -> None:
        """A request is answered; its user is free."""
        self._busy.discard(self._asks[place].user)

    def next_arrival_s(self) -> float:
        """When the next request is sent, while none is on its way."""
        return min(self._asks[q[0]].arrival_s or 0.0 for q in self._queues.values() if q)


def serve(
    engine: Engine,
    asks: Sequence[Ask],
    sampling: SamplingConfig,
    after_step: Callable[[], None] = lambda: None,
) -> list[Served | str]:
    """Serve every request to its end.

    A request with a time of arrival counts as sent then, even if the engine was in the middle of
    a step: its user waits for that too.

    Args:
        engine: with nothing on its way.
        asks: a user's in their order.
        sampling: of all; each request has its own seed.
        after_step: called after every step, outside of what it measures.

    Returns:
        What each request gave, in their order, or the reason why it failed.

    Raises:
        ValueError: a request can never fit.
    """
    users, live = _Users(asks), dict[int, _Live]()
    served: dict[int, Served | str] = {}
    started = time.perf_counter()
    while live or not users.are_done:
        now_s = time.perf_counter() - started
        for place in users.due(now_s):
            number, one = _send(engine, asks, place, sampling, now_s)
            live[number] = one
        if not live:
            time.sleep(max(0.0, users.next_arrival_s() - now_s))
            continue
        chunks = engine.advance()
        now_s = time.perf_counter() - started
        for chunk in chunks:
            one = live[chunk.index]
            if chunk.tokens:
                one.chunk_s.append(now_s)
                one.chunk_tokens.append(len(chunk.tokens))
            if chunk.finish_reason:
                served[one.place] = live.pop(chunk.index).served(engine.result(chunk.index))
                users.answer(one.place)
        after_step()
    return [served[place] for place in range(len(asks))]


def _send(
    engine: Engine, asks: Sequence[Ask], place: int, sampling: SamplingConfig, now_s: float
) -> tuple[int, _Live]:
    """Submit a request; returns its number in the engine."""
    ask = asks[place]
    sent_s = now_s if ask.arrival_s is None else ask.arrival_s
    number = engine.submit(
        ask.prompt, replace(sampling, seed=ask.seed), max_new_tokens=ask.max_new_tokens
    )
    return number, _Live(place, sent_s, now_s - sent_s)


_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class SuiteArm:
    """What an engine is given.

    Attributes:
        drafter: None for plain decoding.
        draft_length: what limits its drafts.
    """

    drafter: Drafter | None = None
    draft_length: Any = None


def build_arms(config: SuiteConfig, target: HFTarget) -> dict[str, SuiteArm]:
    """Build every arm afresh, so that nothing it saw before helps it."""
    arms = {"plain": SuiteArm()}
    for arm in config.arms:
        drafter = load_drafter({"type": arm.type, **arm.options}, target)
        arms[arm.name] = SuiteArm(drafter, load_draft_length(arm, drafter, target))
    return arms


def warm_up(config: SuiteConfig, target: HFTarget, arm: SuiteArm, groups: list[Group]) -> None:
    """Serve the first requests of the most users, cut short.

    Raises:
        ValueError: options that cannot be used; the requests are sound.
    """
    most = max((call for group in groups for call in group.calls), key=len)
    firsts = {ask.user: ask for ask in reversed(most)}.values()
    short = [
        replace(ask, max_new_tokens=min(_WARM_UP_TOKENS, ask.max_new_tokens), arrival_s=None)
        for ask in firsts
    ]
    try:
        serve(_engine(config, target, arm), short, sampling_of(config))
    except ValueError:
        raise
    except PROMPT_ERRORS:
        pass  # the measurement meets it again, and keeps the reason


def measure_call(
    config: SuiteConfig, target: HFTarget, arm: SuiteArm, asks: list[Ask], meter: PowerMeter
) -> Call:
    """Serve requests and measure; a failure is kept as its reason."""
    engine = _engine(config, target, arm)
    watch = MemoryWatch(target.device)
    meter.start()
    rows: list[Served | str]
    try:
        rows = serve(engine, asks, sampling_of(config), meter.look)
    except PROMPT_ERRORS as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        rows = [reason] * len(asks)
    power = meter.stop()
    ends = [row.end_s for row in rows if isinstance(row, Served)]
    wall_s = max(ends) if len(ends) == len(rows) else None
    return Call(rows, wall_s, watch.memory(engine.peak_cache_bytes), power)


def sampling_of(config: SuiteConfig) -> SamplingConfig:
    """What all requests share; each has its own seed."""
    return SamplingConfig(**vars(config.sampling))


def _engine(config: SuiteConfig, target: HFTarget, arm: SuiteArm) -> Engine:
    max_rows, max_cache_bytes = 1, None
    if isinstance(config, ConcurrentConfig):
        max_rows, max_cache_bytes = config.max_rows, config.max_cache_bytes
    return Engine(
        target,
        arm.drafter,
        max_rows=max_rows,
        max_cache_bytes=max_cache_bytes,
        rule=config.rule,
        draft_length=arm.draft_length,
    )
