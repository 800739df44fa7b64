"""Where the time of an arm went, and where its speedup went."""

from dataclasses import dataclass
from math import prod
from typing import Any

# Parts of a step in the order of the pictures.
PARTS = {
    "target": "target forward",
    "draft": "drafting",
    "verify": "verify",
    "commit": "commit",
    "other": "rest of the loop",
}
OUTSIDE = "outside of steps"


@dataclass(frozen=True)
class Breakdown:
    """The decoding time of an arm.

    Attributes:
        tau: tokens a step.
        step_ms: milliseconds of a step by part, a batch's time shared by its rows.
    """

    name: str
    tau: float
    step_ms: dict[str, float]

    @property
    def token_ms(self) -> dict[str, float]:
        """Milliseconds of an emitted token by part."""
        return {part: value / self.tau for part, value in self.step_ms.items()}


@dataclass(frozen=True)
class Waterfall:
    """The way from tau down to the measured speedup.

    Attributes:
        tau: the speedup, if a step cost what a step of plain decoding costs and nothing else.
        factors: factor of each part in order; tau times all of them is `measured`.
        measured: speedup over plain decoding.
    """

    name: str
    tau: float
    factors: dict[str, float]
    measured: float


def break_down(arm: Any, repeats: int) -> Breakdown | None:
    """Split the time of a step into its parts; None where steps were not timed."""
    steps = count_steps(arm, repeats)
    if not steps or not arm.tau or not arm.time_s.wall:
        return None
    times = {part: getattr(arm.time_s, part) for part in PARTS}
    step_ms = {part: 1000 * time / steps for part, time in times.items() if time is not None}
    return Breakdown(arm.name, arm.tau, step_ms)


def count_steps(arm: Any, repeats: int) -> float:
    """Count verify steps of all repeats; without figures by prompt, from T - 1 = tau S of each."""
    if arm.per_prompt:
        return sum(each.steps for each in arm.per_prompt if each is not None)
    if not arm.tau:
        return 0
    return repeats * (arm.tokens - arm.prompts + arm.failed) / arm.tau


def explain_speedup(arm: Any, ours: Breakdown, plain: Breakdown) -> Waterfall | None:
    """Split the speedup of an arm into factors; None where it has no speedup.

    Each part is added to the cost of a plain step in turn, and its factor is the cost before over
    the cost after. The last one holds what is outside of steps: the time between them, in a batch
    the wait for other rows, and that a prompt counts by the median of its repeats.
    """
    measured = arm.speedup_vs_plain
    if measured is None:
        return None
    cost = sum(plain.step_ms.values())
    factors = {}
    for part, name in PARTS.items():
        if part in ours.step_ms:
            more = cost + ours.step_ms[part] - plain.step_ms.get(part, 0.0)
            factors[name] = cost / more
            cost = more
    factors[OUTSIDE] = measured / (ours.tau * prod(factors.values()))
    return Waterfall(arm.name, ours.tau, factors, measured)
