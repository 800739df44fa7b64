"""Whether the first drafted token is taken, by where it stands and what it is."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.analysis.evidence import Array
from specdec.analysis.facts import CLASSES, TextFacts

ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # nats


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """Places where a step might start, or did.

    Attributes:
        text: [n] int64, which text.
        step: [n] int64, tokens done before it, less one.
        accepted: [n] float64 probability that it accepts a token; None where it is not worked out.
        overlap: [n] float64 sum_x min(p(x), q(x)); None of a drafter without a law.
    """

    text: Array
    step: Array
    accepted: Array | None
    overlap: Array | None

    def entropy_bins(self, facts: TextFacts) -> list[dict[str, Any]]:
        """By the target's entropy: {low, high, count, alpha, acceptance}; the last has no end."""
        entropy = facts.entropy[self.text, self.step]
        edges: list[float | None] = [*ENTROPY_EDGES, None]
        return [
            {"low": low, "high": high, **self._figures(_within(entropy, low, high))}
            for low, high in pairwise(edges)
        ]

    def token_classes(self, facts: TextFacts) -> list[dict[str, Any]]:
        """By the class of the token that came: {name, count, alpha, acceptance}."""
        classes = facts.token_class[self.text, self.step]
        rows = [
            {"name": name, **self._figures(classes == index)} for index, name in enumerate(CLASSES)
        ]
        return [row for row in rows if row["count"]]

    def positions(self) -> list[dict[str, Any]]:
        """By the token's place in its answer, from 0: {low, high, count, alpha, acceptance}."""
        place = self.step + 1
        last = int(place.max()) if len(place) else 0
        edges = [1]
        while edges[-1] <= last:
            edges.append(2 * edges[-1])
        return [
            {"low": low, "high": high, **self._figures(_within(place, low, high))}
            for low, high in pairwise(edges)
        ]

    def _figures(self, mask: Array) -> dict[str, Any]:
        return {
            "count": int(mask.sum()),
            "alpha": _mean(self.overlap, mask),
            "acceptance": _mean(self.accepted, mask),
        }


def _mean(values: Array | None, mask: Array) -> float | None:
    return float(values[mask].mean()) if values is not None and mask.any() else None


def _within(values: Array, low: float | None, high: float | None) -> Array:
    inside: Array = (values >= (-np.inf if low is None else low)) & (
        values < (np.inf if high is None else high)
    )
    return inside
