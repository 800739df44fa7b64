"""Where the greedy tokens of two arms part, and how close the target's choice was there."""

import math
from collections.abc import Sequence
from typing import Any

from specdec.bench.config import BenchConfig
from specdec.bench.outcome import Run, Table
from specdec.interfaces import claimed
from specdec.sampling import Sampler
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget

BASELINES = ("plain", "hf_generate")


def find_differences(
    config: BenchConfig, tables: dict[str, Table], target: HFTarget, ids: Sequence[list[int]]
) -> dict[str, list[dict[str, Any]]]:
    """Per arm, the prompts whose greedy tokens differ from a baseline's; none when sampling.

    Half precision rounds differently in batches of other shapes, so that near ties may fall the
    other way: the gap between the two best logits at the first difference says whether it was one.

    Args:
        config: of the bench.
        tables: runs of every arm.
        target: computes the logits.
        ids: the prompts.

    Returns:
        Arm -> a dictionary a prompt: `prompt` (its number), `against` (the baseline), `position`
        (of the first output token that differs) and `top2_gap` (of the logits there; None where the
        sampling settings leave a single token).
    """
    if config.sampling.temperature > 0:
        return {name: [] for name in tables}
    gaps = LogitGaps(SamplingConfig(**vars(config.sampling)), target)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, table in tables.items():
        found[name] = []
        for prompt, runs in enumerate(table):
            against, position, prefix = _first_difference(runs, tables, prompt)
            if against:
                gap = gaps.at(tuple(ids[prompt]), prefix)
                where = {"prompt": prompt, "against": against, "position": position}
                found[name].append({**where, "top2_gap": gap})
    return found


def _first_difference(
    runs: list[Run | None], tables: dict[str, Table], prompt: int
) -> tuple[str, int, tuple[int, ...]]:
    """The baseline that differs first, where, and the tokens before; "" if none does."""
    for baseline in BASELINES:
        for ours in runs:
            for theirs in tables[baseline][prompt]:
                if ours and theirs and ours.tokens != theirs.tokens:
                    position = parting(ours.tokens, theirs.tokens)
                    return baseline, position, tuple(ours.tokens[:position])
    return "", 0, ()


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Position of the first token that differs; where one ends first, its length."""
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


class LogitGaps:
    """Top-2 gaps of the target's processed logits; arms often part at the same place."""

    def __init__(self, sampling: SamplingConfig, target: HFTarget) -> None:
        self._target, self._sampling = target, sampling
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
