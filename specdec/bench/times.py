"""Where the decoding time went; definitions stand in `specdec.metrics`."""

from collections.abc import Sequence
from statistics import median

from specdec.metrics import StepRecord

_PARTS = ("draft", "target", "verify", "commit")


def time_s(records: Sequence[StepRecord]) -> dict[str, float]:
    """Seconds by part of the step, "other" for the rest, and "wall" for all."""
    times = {part: _total(records, part) for part in _PARTS}
    wall = _total(records, "wall")
    return {**times, "other": wall - sum(times.values()), "wall": wall}


def loop_efficiency(records: Sequence[StepRecord]) -> float | None:
    """Share of the wall time in model forwards; None without a step."""
    times = time_s(records)
    return (times["draft"] + times["target"]) / times["wall"] if times["wall"] else None


def other_ms_per_step(records: Sequence[StepRecord]) -> float | None:
    """Median time in neither model per target step, ms."""
    gaps = [r.wall_s - r.draft_s - r.target_s for r in records]
    return 1000 * median(gaps) if gaps else None


def _total(records: Sequence[StepRecord], part: str) -> float:
    """A batch's time counts once, not once a row."""
    return sum(getattr(record, f"{part}_s") / record.batch_size for record in records)
