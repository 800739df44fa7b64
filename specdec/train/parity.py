"""The gate at a run's end: decoding must accept what offline acceptance predicts.

Training measures a drafter in memory on whole texts; serving loads it from its files and feeds it
token by token. Whatever goes wrong in between (a tap, a position, a vocabulary map, rounded
weights) leaves every training metric as good as it was. So both are made to say tau on the same
texts, and have to agree.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from specdec.analysis.replay import MadeDrafts, replay
from specdec.analysis.texts import Text
from specdec.common.stats import tau_interval
from specdec.data.answers import AnswerRow
from specdec.drafters.training import shifted
from specdec.engine.decode import generate, generate_baseline
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.engine.request import Result
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.train.config import ParityConfig
from specdec.train.heads import Trainee
from specdec.train.results import FeatureCheck, Parity, TrainResults
from specdec.train.sources import OnlineSource, Source
from specdec.verify.tree import StaticTree

# Stored bf16, and a target in half precision, stay below a hundredth; the next layer's states are
# a seventh off or more.
MAX_FEATURE_DIFFERENCE = 0.05
Steps = list[list[StepRecord]]  # of each prompt


class ParityError(RuntimeError):
    """The drafter does not accept in decoding what was predicted.

    Attributes:
        results: the complete results of the run.
    """

    def __init__(self, message: str, results: TrainResults) -> None:
        super().__init__(message)
        self.results = results


class ParityGate:
    """Prompts, what the target says to them, and two ways to tau along it."""

    def __init__(
        self,
        source: OnlineSource,
        rows: Sequence[AnswerRow],
        config: ParityConfig,
        shape: StaticTree,
    ) -> None:
        self.source, self.config, self.shape = source, config, shape
        self.prompts = choose_prompts(rows, config.num_prompts)
        room = source.target.max_context_len
        self.texts = [
            Text(prompt, result.tokens, min(config.max_new_tokens, room - len(prompt)))
            for prompt, result in zip(
                self.prompts, self._finished(generate_baseline, source.target), strict=True
            )
        ]

    @torch.no_grad()
    def predict(
        self,
        trainee: Trainee,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Steps:
        """Walk the steps of a drafter in memory, by teacher forcing."""
        rows = [
            AnswerRow((*text.prompt, *text.tokens), ((len(text.prompt), len(text.prompt) + 1),))
            for text in self.texts
        ]
        was_training = trainee.training
        trainee.eval()
        drafted: list[Tensor] = []
        for first in range(0, len(rows), self.config.batch_size):
            batch = self.source.batch(rows[first : first + self.config.batch_size])
            with autocast():
                drafted += trainee.candidates(batch, self.shape.depth, self._width).cpu()
        trainee.train(was_training)
        pairs = zip(drafted, self.texts, strict=True)
        made = [each for each, text in pairs if len(text.tokens) > 1]
        drafter: Any = MadeDrafts(made, self.shape)
        return replay(self.source.target, drafter, self.texts, SamplingConfig())

    @property
    def _width(self) -> int:
        """Candidates that are asked for at each level."""
        return int(self.shape.ranks.max()) + 1

    def measure(self, drafter: dict[str, Any]) -> list[Result]:
        """Decode with a drafter from its files."""
        target = self.source.target
        return self._finished(generate, target, load_drafter(drafter, target))

    def _finished(self, decode: Callable[..., list[Result]], *models: Any) -> list[Result]:
        results = decode(
            *models,
            self.prompts,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
        )
        if any(result.finish_reason == "interrupted" for result in results):
            raise KeyboardInterrupt
        return results

    def compare_features(self, stored: Source, rows: Sequence[AnswerRow]) -> FeatureCheck:
        """Compare what a store holds with what the target gives for the same texts.

        A drafter that learned from the wrong states decodes as badly as it then predicts.
        """
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            ours, theirs = stored.batch([row]), self.source.batch([row])
            mask = shifted(ours.loss_mask, 1)  # places that a store has logits for
            kept = ours.target_logits[mask]
            best = kept.topk(min(8, kept.shape[-1]), -1).indices  # a store keeps no more, often
            pairs = {
                f"tap {tap}": (ours.hidden[tap][0], theirs.hidden[tap][0]) for tap in ours.hidden
            }
            pairs["logits"] = kept.gather(-1, best), theirs.target_logits[mask].gather(-1, best)
            for name, (mine, other) in pairs.items():
                size = other.float().norm(dim=-1).clamp_min(1e-9)
                apart = (mine.float() - other.float()).norm(dim=-1) / size
                found.setdefault(name, []).append(apart)
        medians = {name: torch.cat(each).median().item() for name, each in found.items()}
        return FeatureCheck(
            num_rows=len(rows),
            differences=medians,
            max_difference=MAX_FEATURE_DIFFERENCE,
            passed=max(medians.values()) <= MAX_FEATURE_DIFFERENCE,
        )

    def compare(
        self, predicted: Steps, measured: list[Result], features: FeatureCheck | None = None
    ) -> Parity:
        """Judge what `predict`, `measure` and `compare_features` found."""
        same = [
            result.tokens == text.tokens for result, text in zip(measured, self.texts, strict=True)
        ]
        mismatches = same.count(False)
        ours = [steps for steps, is_same in zip(predicted, same, strict=True) if is_same]
        theirs = [
            _within_text(result) for result, is_same in zip(measured, same, strict=True) if is_same
        ]
        expected, found = self._figures("predicted", ours), self._figures("measured", theirs)
        difference = None
        if ours:
            difference = abs(found["measured_tau"] / expected["predicted_tau"] - 1)
        is_near = difference is not None and difference <= self.config.max_difference
        return Parity(
            shape=_in_words(self.shape),
            num_prompts=len(self.prompts),
            max_new_tokens=self.config.max_new_tokens,
            **expected,
            **found,
            relative_difference=difference,
            max_difference=self.config.max_difference,
            mismatches=mismatches,
            features=features,
            passed=is_near
            and not (mismatches and self._is_exact)
            and (features is None or features.passed),
        )

    @property
    def _is_exact(self) -> bool:
        """Both arms must say the same; in half precision batch shapes round differently."""
        model = self.source.target.model
        return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)

    def _figures(self, name: str, steps: Steps) -> dict[str, Any]:
        stats = AcceptanceStats.from_records(chain.from_iterable(steps))
        by_depth: list[float | None] = list(stats.conditional_acceptance_at_depth)
        interval = tau_interval(map(AcceptanceStats.from_records, steps))
        return {
            f"{name}_tau": stats.accepted_length if steps else None,
            f"{name}_tau_ci": interval,
            f"{name}_acceptance": by_depth + [None] * (self.shape.depth - len(by_depth)),
        }


def _in_words(shape: StaticTree) -> str:
    nodes, levels = len(shape.parents), shape.depth
    if nodes == levels:
        return f"chain of {levels} tokens"
    return f"tree of {nodes} nodes on {levels} levels"


def choose_prompts(rows: Sequence[AnswerRow], count: int) -> list[list[int]]:
    """Up to `count` rows, from all domains in turn, each up to where its longest answer starts."""
    domains: dict[str, list[AnswerRow]] = {}
    for row in rows:
        domains.setdefault(row.domain, []).append(row)
    turns = zip_longest(*(domains[name] for name in sorted(domains)))
    spread = [row for turn in turns for row in turn if row is not None]
    return [_before_longest_answer(row) for row in spread[:count]]


def _before_longest_answer(row: AnswerRow) -> list[int]:
    start, _ = max(row.answers, key=lambda answer: answer[1] - answer[0])
    # Every prompt holds a token: of an answer to nothing, its first.
    return list(row.tokens[: max(start, 1)])


def _within_text(result: Result) -> list[StepRecord]:
    """The steps without what they judged behind the end of the text, where nothing is predicted."""
    records, num_done = [], 1
    for record in result.records:
        left = len(result.tokens) - num_done
        records.append(replace(record, depth_tested=min(record.depth_tested, left)))
        num_done += record.num_emitted
    return records


def require_parity(results: TrainResults) -> None:
    """Refuse a run whose drafter was not accepted as predicted; without a gate anything passes."""
    parity = results.parity
    if parity is None or parity.passed:
        return
    where = results.drafter.get("adapter") or results.drafter["path"]
    again = "the same command runs this check again, without training again"
    raise ParityError(
        f"parity gate: {_finding(parity)}. The drafter is in {where!r}; {again}", results
    )


def _finding(parity: Parity) -> str:
    features = parity.features
    if features is not None and not features.passed:
        name, apart = max(features.differences.items(), key=lambda item: item[1])
        return (
            f"the store that it was trained from is not what the target gives: its {name} differ"
            f"{'s' if name != 'logits' else ''} by {apart:.1%} on {features.num_rows} rows, but "
            f"at most {features.max_difference:.1%} may be. Extract the features again, with "
            "this target, and train again"
        )
    prompts = f"{parity.num_prompts} held-out prompts"
    differing = f"the outputs for {parity.mismatches} of {prompts} are not those of plain decoding"
    if parity.relative_difference is None:
        return f"{differing}, which leaves nothing to compare; set target.dtype=float32"
    if parity.relative_difference <= parity.max_difference:
        return f"{differing}, though the target computes in float32"
    return (
        f"with the drafter as it was written, decoding measures tau {parity.measured_tau:.3f} "
        f"where offline acceptance predicts {parity.predicted_tau:.3f}, for a "
        f"{parity.shape} on {prompts}: {parity.relative_difference:.1%} apart, but at most "
        f"{parity.max_difference:.1%} may be. {_first_difference(parity)}"
    )


def _first_difference(parity: Parity) -> str:
    """The first depth whose acceptance is off, and what that points to."""
    pairs = list(zip(parity.predicted_acceptance, parity.measured_acceptance, strict=True))
    gaps = [abs((ours or 0.0) - (theirs or 0.0)) for ours, theirs in pairs]
    most = max(gaps)
    depth = next(n for n, gap in enumerate(gaps) if gap > parity.max_difference or gap == most)
    ours, theirs = (f"{value or 0.0:.2f}" for value in pairs[depth])
    hint = (
        "look at what it reads there: its weights, features, taps, tokenizer or vocabulary map"
        if depth == 0
        else "the depths above are right, so look at positions and at what it feeds to itself"
    )
    return f"They part at depth {depth + 1} ({ours} predicted, {theirs} measured): {hint}"
