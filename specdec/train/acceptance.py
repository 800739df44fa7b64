"""How far drafts would be accepted on held-out rows, and the gate: decoding must agree with it.

Training measures a drafter in memory on whole texts; serving loads it from its files and feeds it
token by token. A fault in between leaves every training metric as good as it was.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate, chain, groupby, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.analysis.replay import MadeDrafts, replay
from specdec.analysis.texts import target_answers
from specdec.common.stats import tau_interval
from specdec.data.answers import AnswerRow
from specdec.drafters.training import TrainingBatch, shifted
from specdec.engine.decode import generate
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.engine.request import Result
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.train.config import ParityConfig, TrainConfig
from specdec.train.data import OnlineSource, Source, seeded
from specdec.train.results import DomainAcceptance, Evaluation, FeatureCheck, Parity, TrainResults
from specdec.train.trainees import Trainee
from specdec.verify.tree import StaticTree

NUM_RANKS = 10
# Stored bf16, and a target in half precision, stay below a hundredth; the next layer's states are
# a seventh off or more.
MAX_FEATURE_DIFFERENCE = 0.05
Steps = list[list[StepRecord]]  # of each prompt


def count_ranks(drafted: Tensor, batch: TrainingBatch) -> Tensor:
    """Count [D, 1 + width] int64: places tested, and those where the target takes each rank.

    Every answer token that has another one after it is a root, after which candidates [B, L, D,
    width] are drafted. A depth is tested where the answer goes on, and the target's argmax was one
    of the candidates at every depth above. With width 1 these are greedy chains.
    """
    best = batch.target_logits.argmax(-1)  # [B, L], place i says t_{i+1}
    # A root at i + 1 follows the feature at i.
    alive = shifted(batch.loss_mask, 1)
    counts = []
    for level in range(drafted.shape[2]):
        alive = alive & shifted(batch.loss_mask, 2 + level)
        taken = drafted[:, :, level] == shifted(best, 1 + level).unsqueeze(-1)
        taken = taken & alive.unsqueeze(-1)  # [B, L, width]
        counts.append(torch.cat([alive.sum().view(1), taken.sum((0, 1))]))
        alive = taken.any(-1)
    return torch.stack(counts)


def chain_acceptance(counts: Tensor) -> tuple[float, list[float | None]]:
    """Turn sums of `count_ranks` with width 1 into tau, and the share that matches by depth.

    Tau is 1.0 without a root; the share is None where no chain was tested.
    """
    tested, matched = counts.T.tolist()
    tau = 1 + sum(matched) / max(tested[0], 1)
    return tau, [m / t if t else None for m, t in zip(matched, tested, strict=True)]


def drafted_places(batch: TrainingBatch) -> Tensor:
    """Mask [B, L] of the places i where t_{i+1} may be a root and t_{i+2} is the target's too."""
    return shifted(batch.loss_mask, 1) & shifted(batch.loss_mask, 2)


def sum_of_overlaps(guesses: Tensor, target_logits: Tensor) -> Tensor:
    """Sum alpha [2] in float64, at temperature 0 and at 1, over the places.

    At 0 a place counts 1 if both argmaxes agree; at 1 it counts sum_x min(p(x), q(x)).

    Source: Leviathan et al. 2022, arXiv 2211.17192, theorem 3.5.
    """
    same = (guesses.argmax(-1) == target_logits.argmax(-1)).sum()
    mine, its = guesses.float().softmax(-1), target_logits.float().softmax(-1)
    # Rounding may lift the overlap of two equal distributions above 1.
    overlaps = torch.minimum(mine, its).sum(-1).clamp(max=1)
    return torch.stack([same.double(), overlaps.sum(dtype=torch.float64)])


def _by_domain(rows: Sequence[AnswerRow]) -> dict[str, list[AnswerRow]]:
    ordered = sorted(rows, key=lambda row: row.domain)
    return {name: list(each) for name, each in groupby(ordered, key=lambda row: row.domain)}


@torch.no_grad()
def evaluate(
    trainee: Trainee,
    source: Source,
    rows: Sequence[AnswerRow],
    config: TrainConfig,
    accelerator: Any,
) -> Evaluation:
    """Measure loss and offline acceptance on held-out rows, which the processes share out."""
    chosen, device = config.training, accelerator.device
    batch_size = chosen.per_device_eval_batch_size or chosen.per_device_train_batch_size
    depth = trainee.max_depth or config.eval_depth
    trainee.eval()
    domains = _by_domain(sorted(rows, key=lambda row: len(row.tokens)))
    batches = [
        (number, at, each[at : at + batch_size])
        for number, each in enumerate(domains.values())
        for at in range(0, len(each), batch_size)
    ]
    size = 5 + depth * (2 + 1 + NUM_RANKS)
    sums = torch.zeros(len(domains), size, dtype=torch.float64, device=device)
    # Processes work in step, as sharded weights ask for: one without a batch repeats the first.
    rank, world = accelerator.process_index, accelerator.num_processes
    for turn in range(rank, -(-len(batches) // world) * world, world):
        number, at, some = batches[turn if turn < len(batches) else 0]
        batch = source.batch(some)
        with accelerator.autocast():
            with seeded(device, chosen.seed, at // batch_size):
                loss, _ = trainee(batch)
            mask = drafted_places(batch)
            guessed = trainee.guesses(batch, mask)
            drafted = trainee.candidates(batch, depth, NUM_RANKS)
        if turn < len(batches):
            tokens, chains = batch.loss_mask.sum(), count_ranks(drafted[..., :1], batch)
            overlaps = sum_of_overlaps(guessed, shifted(batch.target_logits, 1)[mask])
            # A small vocabulary has fewer ranks.
            ranks = pad(count_ranks(drafted, batch), (0, NUM_RANKS - drafted.shape[-1]))
            parts = (loss * tokens, tokens, mask.sum(), overlaps, chains, ranks)
            sums[number] += torch.cat([part.double().flatten() for part in parts])
    trainee.train()
    sums = accelerator.reduce(sums, "sum")
    total = sums.sum(0)
    counts = total[5 + 2 * depth :].view(depth, -1).float()
    by_rank = (counts[:, 1:] / counts[:, :1].clamp(min=1)).tolist()
    return Evaluation(
        validation_loss=(total[0] / total[1]).item(),
        **_acceptance(total, depth),
        acceptance_by_rank=[[round(share, 6) for share in row] for row in by_rank],
        domains={
            name: DomainAcceptance(rows=len(each), **_acceptance(its, depth))
            for (name, each), its in zip(domains.items(), sums, strict=True)
            if name
        },
    )


def _acceptance(sums: Tensor, depth: int) -> dict[str, Any]:
    tau, by_depth = chain_acceptance(sums[5 : 5 + 2 * depth].view(depth, 2))
    places, greedy, sampled = sums[2:5].tolist()
    alpha = {"0": greedy / places, "1": sampled / places} if places else None
    return {"tau": tau, "acceptance": by_depth, "alpha": alpha}


class ParityError(RuntimeError):
    """The drafter does not accept in decoding what was predicted; the results are complete."""

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
        self._limits = config.model_dump(include={"max_new_tokens", "batch_size"})
        greedy = SamplingConfig()
        self.texts = target_answers(source.target, self.prompts, greedy, **self._limits)

    @torch.no_grad()
    def predict(
        self, trainee: Trainee, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Steps:
        """Walk the steps of a drafter in memory, by teacher forcing."""
        rows = [
            AnswerRow((*text.prompt, *text.tokens), ((len(text.prompt), len(text.prompt) + 1),))
            for text in self.texts
        ]
        width = int(self.shape.ranks.max()) + 1
        trainee.eval()
        drafted: list[Tensor] = []
        for first in range(0, len(rows), self.config.batch_size):
            batch = self.source.batch(rows[first : first + self.config.batch_size])
            with autocast():
                drafted += trainee.candidates(batch, self.shape.depth, width).cpu()
        pairs = zip(drafted, self.texts, strict=True)
        drafter: Any = MadeDrafts([x for x, text in pairs if len(text.tokens) > 1], self.shape)
        return replay(self.source.target, drafter, self.texts, SamplingConfig())

    def measure(self, drafter: dict[str, Any]) -> list[Result]:
        """Decode with a drafter from its files."""
        target = self.source.target
        results = generate(target, load_drafter(drafter, target), self.prompts, **self._limits)
        if any(result.finish_reason == "interrupted" for result in results):
            raise KeyboardInterrupt
        return results

    def compare_features(self, stored: Source, rows: Sequence[AnswerRow]) -> FeatureCheck:
        """Compare a store with the target: wrong states decode as badly as they then predict."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for row in rows:
            ours, theirs = stored.batch([row]), self.source.batch([row])
            mask = shifted(ours.loss_mask, 1)  # places that a store has logits for
            kept = ours.target_logits[mask]
            best = kept.topk(min(8, kept.shape[-1]), -1).indices  # a store keeps no more, often
            pairs = {f"tap {t}": (ours.hidden[t][0], theirs.hidden[t][0]) for t in ours.hidden}
            pairs["logits"] = kept.gather(-1, best), theirs.target_logits[mask].gather(-1, best)
            for name, (mine, other) in pairs.items():
                size = other.float().norm(dim=-1).clamp_min(1e-9)
                apart = (mine.float() - other.float()).norm(dim=-1) / size
                found[name].append(apart)
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
        sides = zip(predicted, measured, self.texts, strict=True)
        pairs = [(steps, _within_text(x)) for steps, x, text in sides if x.tokens == text.tokens]
        mismatches = len(self.texts) - len(pairs)
        expected = self._figures("predicted", [steps for steps, _ in pairs])
        found = self._figures("measured", [steps for _, steps in pairs])
        apart = abs(found["measured_tau"] / expected["predicted_tau"] - 1) if pairs else None
        # Both must say the same; in half precision batch shapes round differently.
        model, limit = self.source.target.model, self.config.max_difference
        is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        nodes, levels = len(self.shape.parents), self.shape.depth
        tree = f"tree of {nodes} nodes on {levels} levels"
        return Parity(
            shape=f"chain of {levels} tokens" if nodes == levels else tree,
            num_prompts=len(self.prompts),
            max_new_tokens=self.config.max_new_tokens,
            **expected,
            **found,
            relative_difference=apart,
            max_difference=limit,
            mismatches=mismatches,
            features=features,
            passed=apart is not None
            and apart <= limit
            and not (mismatches and is_exact)
            and (features is None or features.passed),
        )

    def _figures(self, name: str, steps: Steps) -> dict[str, Any]:
        stats = AcceptanceStats.from_records(chain.from_iterable(steps))
        by_depth: list[float | None] = list(stats.conditional_acceptance_at_depth)
        return {
            f"{name}_tau": stats.accepted_length if steps else None,
            f"{name}_tau_ci": tau_interval(map(AcceptanceStats.from_records, steps)),
            f"{name}_acceptance": by_depth + [None] * (self.shape.depth - len(by_depth)),
        }


def choose_prompts(rows: Sequence[AnswerRow], count: int) -> list[list[int]]:
    """Take up to `count` rows, from all domains in turn, each cut before its longest answer."""
    turns = chain.from_iterable(zip_longest(*_by_domain(rows).values()))
    chosen = [row for row in turns if row is not None][:count]
    starts = [max(row.answers, key=lambda answer: answer[1] - answer[0])[0] for row in chosen]
    # Every prompt holds a token: of an answer to nothing, its first.
    return [list(row.tokens[: max(start, 1)]) for row, start in zip(chosen, starts, strict=True)]


def _within_text(result: Result) -> list[StepRecord]:
    """Leave out what steps judged after the end of the text, where nothing is predicted."""
    done = accumulate((record.num_emitted for record in result.records), initial=1)
    return [
        replace(record, depth_tested=min(record.depth_tested, len(result.tokens) - num_done))
        for record, num_done in zip(result.records, done, strict=False)
    ]


def require_parity(results: TrainResults) -> None:
    """Refuse a run whose drafter was not accepted as predicted; without a gate anything passes."""
    if results.parity and not results.parity.passed:
        where = results.drafter.get("adapter") or results.drafter["path"]
        raise ParityError(
            f"parity gate: {_finding(results.parity)}; the drafter is in {where!r}, and the same "
            "command runs this check again, without training again",
            results,
        )


def _finding(parity: Parity) -> str:
    features, apart = parity.features, parity.relative_difference
    if features is not None and not features.passed:
        name, most = max(features.differences.items(), key=lambda item: item[1])
        return (
            f"the store is not what the target gives: it differs by {most:.1%} in {name}, but at "
            f"most {features.max_difference:.1%} may be; extract the features and train again"
        )
    prompts = f"{parity.num_prompts} held-out prompts"
    differing = f"the outputs for {parity.mismatches} of {prompts} are not those of plain decoding"
    if apart is None:
        return f"{differing}, which leaves nothing to compare; set target.dtype=float32"
    if apart <= parity.max_difference:
        return f"{differing}, though the target computes in float32"
    # The first depth whose acceptance is off says where to look.
    depths = zip(parity.predicted_acceptance, parity.measured_acceptance, strict=True)
    pairs = [(ours or 0.0, theirs or 0.0) for ours, theirs in depths]
    gaps = [abs(ours - theirs) for ours, theirs in pairs]
    depth = next(n for n, gap in enumerate(gaps) if gap > parity.max_difference or gap == max(gaps))
    hint = "look at what it reads: weights, features, taps, tokenizer or vocabulary map"
    if depth:
        hint = "the depths above are right, so look at positions and at what it feeds to itself"
    return (
        f"the drafter as it was written measures tau {parity.measured_tau:.3f} where offline "
        f"acceptance predicts {parity.predicted_tau:.3f}, for a {parity.shape} on {prompts}: "
        f"{apart:.1%} apart, but at most {parity.max_difference:.1%} may be. They part at depth "
        f"{depth + 1} ({pairs[depth][0]:.2f} predicted, {pairs[depth][1]:.2f} measured): {hint}"
    )
