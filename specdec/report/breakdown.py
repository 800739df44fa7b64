"""Where the time of an arm went, and where its speedup went."""

from dataclasses import dataclass
from math import prod
from typing import Any

# In the order of the picture. "other" is the rest of the loop.
PARTS = ("target", "draft", "verify", "commit", "other")
PART_NAMES = {
    "target": "target forward",
    "draft": "drafting",
    "verify": "verify",
    "commit": "commit",
    "other": "rest of the loop",
}
# Of the waterfall, behind tau. Plain decoding drafts nothing, so that all drafting is loss.
LOSSES = {
    "target": "wider target forward",
    "draft": "drafting",
    "verify": "verify",
    "commit": "commit",
    "other": "rest of the loop",
}
OUTSIDE = "outside of steps"


@dataclass(frozen=True)
class Breakdown:
    """An arm's decoding time.

    Attributes:
        name: of the arm.
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
    """From tau down to the measured speedup.

    Attributes:
        name: of the arm.
        tau: the speedup, if a step cost what a step of plain decoding costs and nothing else.
        factors: (name, factor), in order; tau times all of them is `measured`.
        measured: the speedup over plain decoding.
    """

    name: str
    tau: float
    factors: list[tuple[str, float]]
    measured: float

    @property
    def product(self) -> float:
        """Tau times all factors."""
        return self.tau * prod(factor for _, factor in self.factors)


def breakdown(arm: dict[str, Any], repeats: int) -> Breakdown | None:
    """Of an arm of `results.json`; None where the steps were not timed, as in transformers' arms.

    Args:
        arm: version 1 or 2. Version 1 knows neither verify nor commit: they are in "other".
        repeats: of the bench.
    """
    steps = num_steps(arm, repeats)
    if not steps or not arm["tau"] or not arm["time_s"]["wall"]:
        return None
    times = {part: arm["time_s"][part] for part in PARTS if part in arm["time_s"]}
    return Breakdown(arm["name"], arm["tau"], {p: 1000 * s / steps for p, s in times.items()})


def num_steps(arm: dict[str, Any], repeats: int) -> float | None:
    """Verify steps of all repeats; in version 1, from T - 1 = tau S of each prompt."""
    if "per_prompt" in arm:
        return sum(each["steps"] for each in arm["per_prompt"] if each is not None)
    if not arm["tau"]:
        return None
    return repeats * (arm["tokens"] - arm["prompts"] + arm["failed"]) / arm["tau"]


def waterfall(arm: dict[str, Any], ours: Breakdown, plain: Breakdown) -> Waterfall | None:
    """Split an arm's speedup into factors; None where it has no speedup.

    Each part is added to the cost of a plain step in turn, and its factor is the cost before over
    the cost after. The last one holds what is outside of steps: the time between them, in a batch
    the wait for other rows, and that a prompt counts by the median of its repeats.
    """
    measured = arm["speedup_vs_plain"]
    if measured is None:
        return None
    cost = sum(plain.step_ms.values())
    factors = []
    for part in PARTS:
        if part in ours.step_ms:
            more = cost + ours.step_ms[part] - plain.step_ms.get(part, 0.0)
            factors.append((LOSSES[part], cost / more))
            cost = more
    so_far = ours.tau * prod(factor for _, factor in factors)
    factors.append((OUTSIDE, measured / so_far))
    return Waterfall(arm["name"], ours.tau, factors, measured)
