"""What a forward of the target costs on this machine: fits to the measured ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.planning.fit import LinearCost, PiecewiseLinear, fit_linear, fit_piecewise


@dataclass(frozen=True)
class ForwardPoint:
    """A measured forward.

    Attributes:
        batch_size: rows.
        new_tokens: a row.
        context: tokens cached before.
        is_tree: with a tree mask.
        median_s: over the repeats.
        spread_s: the middle half of the repeats.
        repeats: their number.
    """

    batch_size: int
    new_tokens: int
    context: int
    is_tree: bool
    median_s: float
    spread_s: float
    repeats: int


def forward_points(cells: Iterable[Mapping[str, Any]]) -> list[ForwardPoint]:
    """Medians over the repeats of timed cells {"batch", "context", "chain", "tree"}."""
    found: dict[tuple[int, int, int, bool], list[float]] = {}
    for cell in cells:
        for kind in ("chain", "tree"):
            for count, seconds in cell.get(kind, {}).items():
                key = (cell["batch"], int(count), cell["context"], kind == "tree")
                found.setdefault(key, []).append(seconds)
    return [ForwardPoint(*key, *_median_and_spread(times)) for key, times in sorted(found.items())]


def _median_and_spread(times: Sequence[float]) -> tuple[float, float, int]:
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float(middle), float(high - low), len(times)


class ForwardCost:
    """Seconds of a target forward, between the measured batches by linear interpolation.

    Args:
        points: see `forward_points`.

    Raises:
        ValueError: no points.
    """

    def __init__(self, points: Sequence[ForwardPoint]) -> None:
        if not points:
            raise ValueError(
                "no target forward was timed, nothing fitted into memory; use a smaller target, "
                "dtype or batch"
            )
        self._chains: dict[int, PiecewiseLinear] = {}
        self._trees: dict[int, LinearCost] = {}
        for batch in sorted({p.batch_size for p in points}):
            here = [p for p in points if p.batch_size == batch]
            self._chains[batch] = _fit([p for p in here if not p.is_tree])
            trees = [p for p in here if p.is_tree]
            if trees:
                self._trees[batch] = _fit_trees(trees, self._chains[batch])

    @property
    def batch_sizes(self) -> list[int]:
        """Those measured, in order."""
        return list(self._chains)

    def __call__(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        """Seconds of a forward over `new_tokens` in each of `batch_size` rows."""
        sizes = np.array(self.batch_sizes, float)
        times = [self._at(size, new_tokens, context, is_tree) for size in self.batch_sizes]
        if batch_size > sizes[-1]:
            return times[-1] * batch_size / float(sizes[-1])
        return float(np.interp(batch_size, sizes, times))

    def _at(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        seconds = self._chains[batch_size](new_tokens, context)
        if is_tree and batch_size in self._trees:
            seconds += self._trees[batch_size]((1.0, new_tokens))
        return max(seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """The fits by batch size."""
        return {
            str(batch): {
                "chain": fit.to_json(),
                "tree_extra": self._trees[batch].to_json() if batch in self._trees else None,
            }
            for batch, fit in self._chains.items()
        }


def _fit(points: Sequence[ForwardPoint]) -> PiecewiseLinear:
    return fit_piecewise(
        [p.new_tokens for p in points],
        [p.context for p in points],
        [p.median_s for p in points],
    )


def _fit_trees(points: Sequence[ForwardPoint], chains: PiecewiseLinear) -> LinearCost:
    """What a tree mask adds; what noise makes it save is no law."""
    extra = [p.median_s - chains(p.new_tokens, p.context) for p in points]
    rows = [(1.0, p.new_tokens) for p in points]
    return fit_linear(("tree", "token"), rows, extra, [p.median_s for p in points])
