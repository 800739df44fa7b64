"""Calls of a suite: requests that one arm serves together, measured."""

from dataclasses import dataclass, replace
from typing import Any

from specdec.bench.calls import PROMPT_ERRORS
from specdec.bench.load_draft_length import load_draft_length
from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.config import ConcurrentConfig, SuiteConfig
from specdec.bench.suites.memory import MemoryWatch
from specdec.bench.suites.power import PowerMeter
from specdec.bench.suites.served import Call, Served
from specdec.bench.suites.serving import serve
from specdec.engine import Engine
from specdec.interfaces import Drafter
from specdec.registry import load_drafter
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget

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
