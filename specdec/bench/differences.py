"""Where greedy outputs differ, and how close the target's choice was there."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import NamedTuple

from specdec.bench.config import SamplingOptions
from specdec.bench.figures import Table
from specdec.bench.workloads import Request
from specdec.engine.interfaces import claimed
from specdec.sampling.sampler import Sampler
from specdec.targets.hf import HFTarget


class Difference(NamedTuple):
    """The first place where an arm's tokens left a baseline's.

    Attributes:
        request: its place among the requests.
        against: the baseline.
        position: place of the first output token that differs.
        top2_gap: between the two best logits there; None where one token alone is allowed.
    """

    request: int
    against: str
    position: int
    top2_gap: float | None


def find_differences(
    requests: Sequence[Request],
    tables: Mapping[str, Table],
    baselines: Sequence[str],
    sampling: SamplingOptions,
    target: HFTarget,
) -> dict[str, list[Difference]]:
    """Find, by arm, the requests whose greedy tokens differ from a baseline's; none when sampling.

    Half precision rounds differently in batches of other shapes, so that near ties may fall the
    other way: the gap between the two best logits at the first difference says whether it was one.
    """
    found: dict[str, list[Difference]] = {name: [] for name in tables}
    if sampling.temperature > 0:
        return found
    gaps = LogitGaps(sampling, target)
    for name, place in product(tables, range(len(requests))):
        pairs = (
            (against, ours.tokens, theirs.tokens)
            for against in baselines
            for ours, theirs in product(tables[name][place], tables[against][place])
            if ours and theirs and ours.tokens != theirs.tokens
        )
        for against, ours, theirs in islice(pairs, 1):
            position = first_difference(ours, theirs)
            gap = gaps.at(tuple(requests[place].prompt), tuple(ours[:position]))
            found[name].append(Difference(place, against, position, gap))
    return found


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Position of the first token that differs; where one ends first, its length."""
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


class LogitGaps:
    """Top-2 gaps of the target's processed logits; arms often differ at the same place."""

    def __init__(self, sampling: SamplingOptions, target: HFTarget) -> None:
        self._target, self._sampling = target, sampling.with_seed(0)
        self._known: dict[tuple[int, ...], float | None] = {}

    def at(self, prompt: tuple[int, ...], prefix: tuple[int, ...]) -> float | None:
        """The gap after a prompt and the output so far; None where one token alone is allowed."""
        context = prompt + prefix
        if context not in self._known:
            self._known[context] = self._measure(prompt, prefix)
        return self._known[context]

    def _measure(self, prompt: tuple[int, ...], prefix: tuple[int, ...]) -> float | None:
        target = self._target
        sampler = Sampler(
            [self._sampling], target.vocab_size, target.device, [prompt], target.eos_token_ids
        )
        with claimed(target):
            logits = target.prefill([prompt + prefix]).logits
        if prefix:
            sampler.observe(logits.new_tensor([prefix]).long())
        best = sampler.scores(logits)[0, 0].float().topk(2).values
        gap = float(best[0] - best[1])
        return gap if math.isfinite(gap) else None
