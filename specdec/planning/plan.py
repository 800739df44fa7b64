"""`specdec plan`: measure costs, combine them with acceptance, choose, and write the plan."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.texts import Text, target_answers
from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.prompts import load_prompts, render
from specdec.bench.runner import provenance_of
from specdec.bench.workloads import fingerprint_of, unfold_turns
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.files import Journal, replace_file
from specdec.engine.text import encode
from specdec.planning.candidates import Candidate, Family, cut, families
from specdec.planning.costs import Costs, ForwardCost
from specdec.planning.measure import FULL, QUICK, Effort, Measurements, Progress, fits
from specdec.planning.prediction import Acceptance, Forecast, Prediction
from specdec.planning.times import TimedRun, Workload
from specdec.targets.load import load_target


def confirm(
    ranked: Sequence[Prediction],
    finalists: int,
    time: Callable[[Sequence[Candidate]], list[TimedRun]],
    predict: Callable[[Sequence[Candidate], Sequence[TimedRun]], list[Prediction]],
) -> tuple[list[Prediction], list[TimedRun]]:
    """Rank again, with the fastest ones' own times in place of those that follow from the fits.

    A fit flatters some of the many configurations, and these are the ones that look fastest. So
    the choice is among those that were timed, all of them in the same rounds: a machine's speed
    moves, and what was timed at another moment cannot be compared within a few percent.

    Args:
        ranked: predictions, the fastest first.
        finalists: how many are timed.
        time: decodes with configurations.
        predict: configurations, from decodings that hold them.

    Returns:
        The finalists, the fastest first, then the others as they were; and what was timed.
    """
    chosen = [prediction.candidate for prediction in ranked[:finalists]]
    finals = time(chosen)
    again = sorted(predict(chosen, finals), key=lambda prediction: -prediction.speedup)
    return [*again, *ranked[finalists:]], finals


# Predicted gain below which plain decoding is kept: noise must not decide.
MARGIN = 0.02
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True)
class Schedule:
    """Draft lengths by batch size for one drafter.

    Attributes:
        nodes: most nodes a row by batch size; 0 is plain decoding.
        predictions: of every length that was compared, by batch size.
        step_s: seconds of a whole step by batch size and by nodes that it drafts; 0 is plain
            decoding.
    """

    nodes: dict[int, int]
    predictions: dict[int, list[Prediction]]
    step_s: dict[int, dict[int, float]]

    def to_json(self) -> dict[str, Any]:
        """The lengths, and what they were chosen from."""
        return {
            "nodes": {str(size): nodes for size, nodes in self.nodes.items()},
            "predictions": [
                {
                    "batch_size": size,
                    "nodes": each.candidate.shape.nodes,
                    "predicted_tau": each.tau,
                    "predicted_speedup": each.speedup,
                    "predicted_speedup_ci": each.speedup_ci,
                    "is_timed": each.is_timed,
                }
                for size, row in self.predictions.items()
                for each in row
            ],
        }


def cuts(candidate: Candidate) -> Iterator[Candidate]:
    """The candidate with at most 1, 2, 3, ... nodes, itself last."""
    wanted = {nodes for nodes in NODES if nodes < candidate.shape.nodes} | {candidate.shape.nodes}
    for nodes in sorted(wanted):
        options, shape = cut(candidate.type, candidate.options, candidate.shape, nodes)
        if shape.nodes == nodes:
            yield Candidate(f"{nodes} nodes", candidate.type, options, candidate.drafter, shape)


def schedule(forecast: Forecast, candidate: Candidate, batch_sizes: Sequence[int]) -> Schedule:
    """Choose a draft length for every batch size.

    Args:
        forecast: its costs must hold the candidate's drafter at these batch sizes.
        candidate: what drafts.
        batch_sizes: rows.
    """
    lengths = list(cuts(candidate))
    predictions = {size: [forecast(each, size) for each in lengths] for size in batch_sizes}
    nodes = {}
    for size, row in predictions.items():
        # The choice of a plan was timed as it is, and has beaten its cuts already.
        best = row[-1] if row[-1].is_timed else max(row, key=lambda p: p.speedup)
        nodes[size] = best.candidate.shape.nodes if best.speedup > 1 + MARGIN else 0
    step_s = {
        size: {
            0: forecast.plain(size).wall_s,
            **{each.shape.nodes: forecast.full_step(each, size).wall_s for each in lengths},
        }
        for size in batch_sizes
    }
    return Schedule(nodes, predictions, step_s)


# A bound is believed to this share: a dynamic tree's reranking may drop what a smaller one kept.
SLACK = 0.03


def search(
    candidates: Sequence[Candidate],
    predict: Callable[[Candidate], Prediction],
    bound: Callable[[Candidate, Candidate], float],
    wanted: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[Prediction]:
    """Predict whatever may be among the fastest, and every given configuration.

    Args:
        candidates: distinct configurations.
        predict: of one; dear.
        bound: of a candidate's speed, given a larger one whose prediction is known; cheap.
        wanted: how many of the fastest.
        progress: called with candidates settled, candidates in all, and what comes next.

    Returns:
        Predictions, the fastest first; of equally fast ones the smaller draft first. Every
        candidate that is left out is slower than the first `wanted` of them.
    """
    found: list[Prediction] = []
    waiting = list(candidates)
    bounds = dict.fromkeys(range(len(waiting)), inf)
    left = sorted(bounds, key=lambda i: _largest_first(waiting[i]))
    while left:
        index = max(left, key=lambda i: (waiting[i].is_given, bounds[i]))
        candidate = waiting[index]
        if not candidate.is_given and bounds[index] < _least(found, wanted):
            break
        progress(len(waiting) - len(left), len(waiting), candidate.name)
        left.remove(index)
        found.append(predict(candidate))
        for other in left:
            if _covers(candidate, waiting[other]):
                limit = bound(waiting[other], candidate) * (1 + SLACK)
                bounds[other] = min(bounds[other], limit)
    progress(len(waiting), len(waiting), "search")
    return sorted(found, key=lambda p: (-p.speedup, p.candidate.shape.nodes, p.candidate.name))


def _least(found: Sequence[Prediction], wanted: int) -> float:
    """The speed that a candidate has to reach: of the last one wanted, as far as there are."""
    speeds = sorted((each.speedup for each in found), reverse=True)
    return speeds[wanted - 1] if len(speeds) >= wanted else 0.0


def _covers(larger: Candidate, smaller: Candidate) -> bool:
    same = larger.drafter == smaller.drafter
    return same and larger.shape.covers(smaller.shape)


def _largest_first(candidate: Candidate) -> tuple[float, ...]:
    shape = candidate.shape
    return (-shape.nodes, -shape.depth, -shape.width, shape.threshold)


RUNNERS_UP = 5


def run_plan(
    config: BenchConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """Plan a bench's drafters on this machine; writes `plan.json` and `bench.yaml`.

    Args:
        config: target, prompts, sampling, and arms, which say which drafters there are.
        folder: what was measured is kept there in `costs.jsonl`, and not measured again.
        progress: called with points done, points in all, and what runs next.
        quick: measure few points once, to try things out.

    Returns:
        The content of `plan.json`.

    Raises:
        ValueError: no arm with a drafter, options or settings whose acceptance cannot be worked
            out, or a folder of another plan.
        OSError: the folder cannot be written, or is full; finished points are kept.
    """
    torch.set_num_threads(config.threads)
    planner = _Planner(config, QUICK if quick else FULL, progress)
    identity = planner.identity(quick)
    checks = {TARGET: partial(check_resumed, folder)}
    journal = Journal(folder / "costs.jsonl", identity, checks, private=True)
    try:
        found = planner.plan(journal)
    finally:
        journal.close()
    replace_file(folder / "bench.yaml", _yaml(found["config"], found["choice"]).encode())
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "plan.json", text.encode())
    return found


class _Planner:
    """What a plan works with: target, workload, drafters."""

    def __init__(self, config: BenchConfig, effort: Effort, progress: Progress) -> None:
        self.config, self.effort, self.progress = config, effort, progress
        self.sampling = config.sampling.with_seed(config.seed)
        check_settings(self.sampling, config.rule)
        where = config.prompts
        prompts = load_prompts(where.source, where.num, where.data_dir, where.seed)
        asked = fingerprint_of([asdict(prompt) for prompt in prompts])
        self.target = load_target(**config.target.model_dump())
        self.provenance = provenance_of(config, asked, self.target)
        self.mark = self.provenance["config_fingerprint"]
        prompts = unfold_turns(prompts, self.target, config.max_new_tokens, progress)
        tokenizer = self.target.tokenizer
        ids = [encode(render(p, tokenizer), self.target, i) for i, p in enumerate(prompts)]
        self.work = Workload(ids, self.sampling, config.max_new_tokens, config.rule)
        self.families = families(config.arms, self.target)

    def identity(self, quick: bool) -> dict[str, Any]:
        """Facts that make measured points belong to this plan."""
        kept = ("device", "cpu", "threads", "dtype", "quantized")
        return {
            "plan": self.mark,
            "quick": quick,
            **{key: self.provenance[key] for key in kept},
            TARGET: as_json(identify_target(self.target)),
        }

    def plan(self, journal: Journal) -> dict[str, Any]:
        """Measure, predict, choose."""
        size = self.config.batch_size
        texts = self._texts()
        acceptance = self._acceptance(texts)
        measured = Measurements(self.target, self.work, self.effort, journal, self.progress)
        forward, points, skipped = measured.forwards(size)
        timed = [candidate for family in self.families for candidate in family.timed()]
        runs = {size: measured.decodings(timed, size, self.effort.rounds)}
        context = _mean_context(texts)
        forecast = Forecast(Costs(forward, runs), acceptance, context, self.config.seed)
        ranked, finals = self._confirm(measured, forecast, self._search(forecast), runs)
        family = next(f for f in self.families if f.name == ranked[0].candidate.drafter)
        others, left_out = self._other_batches(measured, forward, family)
        runs |= others
        costs = Costs(forward, runs, finals, size)
        everywhere = Forecast(costs, acceptance, context, self.config.seed)
        lengths = schedule(everywhere, ranked[0].candidate, sorted(runs))
        return {
            "schema": "specdec-plan-2",
            "provenance": self.provenance,
            "target": asdict(identify_target(self.target)),
            "workload": {
                "prompts": len(texts),
                "tokens": sum(len(text.tokens) for text in texts),
                "mean_context": context,
            },
            "costs": {
                "points": [vars(point) for point in points],
                "skipped": [*skipped, *left_out],
                **costs.to_json(),
            },
            "trust": measured.trust([*runs[size], *finals]),
            **self._decision(ranked, lengths),
        }

    def _texts(self) -> list[Text]:
        self.progress(0, 1, "the target's own answers")
        config = self.config
        return target_answers(
            self.target, list(self.work.prompts), self.sampling, config.max_new_tokens
        )

    def _acceptance(self, texts: list[Text]) -> Acceptance:
        """Acceptance along the texts; what none can be worked out for is told first of all."""
        config = self.config
        predictor = Predictor(self.target, texts, self.sampling, config.seed, config.rule)
        acceptance = Acceptance(predictor.predict)
        given = [candidate for family in self.families for candidate in family.given]
        for done, candidate in enumerate(given):
            self.progress(done, len(given), f"acceptance of {candidate.name}")
            acceptance(candidate)
        return acceptance

    def _search(self, forecast: Forecast) -> list[Prediction]:
        size = self.config.batch_size
        candidates = [c for family in self.families for c in family.searched()]
        return search(
            candidates,
            lambda candidate: forecast(candidate, size),
            lambda candidate, larger: forecast.bound(candidate, size, larger),
            self.effort.finalists,
            self.progress,
        )

    def _confirm(
        self,
        measured: Measurements,
        forecast: Forecast,
        ranked: Sequence[Prediction],
        runs: Mapping[int, Sequence[TimedRun]],
    ) -> tuple[list[Prediction], list[TimedRun]]:
        size = self.config.batch_size
        # No prompt twice: a drafter that remembers would be flattered.
        rounds = max(1, min(self.effort.final_rounds, len(self.work.prompts) // size))

        def predict(
            candidates: Sequence[Candidate], finals: Sequence[TimedRun]
        ) -> list[Prediction]:
            costs = Costs(forecast.costs.forward, runs, finals, size)
            again = Forecast(costs, forecast.expected, forecast.context, self.config.seed)
            return [again(candidate, size) for candidate in candidates]

        return confirm(
            ranked,
            self.effort.finalists,
            lambda candidates: measured.decodings(candidates, size, rounds, "final"),
            predict,
        )

    def _other_batches(
        self, measured: Measurements, forward: ForwardCost, family: Family
    ) -> tuple[dict[int, list[TimedRun]], list[str]]:
        """The chosen drafter's decodings at the other batch sizes, and what does not fit."""
        runs: dict[int, list[TimedRun]] = {}
        for size in forward.batch_sizes:
            if size != self.config.batch_size:
                found = fits(_decodings(measured, family, size, self.effort.batch_rounds))
                if found is None:
                    what = f"decoding {size} or more rows with {family.name}"
                    return runs, [f"{what} does not fit into memory"]
                runs[size] = found
        return runs, []

    def _decision(self, ranked: Sequence[Prediction], lengths: Schedule) -> dict[str, Any]:
        best = ranked[0]
        pays = best.speedup > 1 + MARGIN
        arm = ArmConfig(
            name=best.candidate.name, type=best.candidate.type, options=best.candidate.options
        )
        chosen = self.config.model_dump(mode="json")
        chosen |= {"arms": [arm.model_dump(mode="json")] if pays else []}
        return {
            "configurations": [prediction.to_json() for prediction in ranked],
            "choice": best.to_json() if pays else _plain(best),
            "runners_up": [p.to_json() for p in ranked[pays:][:RUNNERS_UP]],
            "schedule": {str(size): nodes for size, nodes in lengths.nodes.items()},
            "schedule_predictions": lengths.to_json()["predictions"],
            "controller": {
                "drafter": best.candidate.drafter,
                "step_s": {
                    str(size): {str(nodes): seconds for nodes, seconds in row.items()}
                    for size, row in lengths.step_s.items()
                },
            },
            "config": _not_default(chosen, BenchConfig()),
        }


def _decodings(
    measured: Measurements, family: Family, size: int, rounds: int
) -> Callable[[], list[TimedRun]]:
    return lambda: measured.decodings(family.timed(), size, rounds)


def _mean_context(texts: Sequence[Text]) -> float:
    """Tokens in the cache at the mean step."""
    return sum(len(text.prompt) + len(text.tokens) / 2 for text in texts) / len(texts)


def _plain(beside: Prediction) -> dict[str, Any]:
    """Plain decoding as the choice, where no drafter is worth it."""
    plain = beside.plain
    return {
        "name": "plain",
        "type": "plain",
        "options": {},
        "is_given": False,
        "is_timed": True,
        "batch_size": beside.batch_size,
        "predicted_tau": 1.0,
        "predicted_tau_ci": None,
        "predicted_speedup": 1.0,
        "predicted_speedup_ci": None,
        "step_ms": {
            "draft": 0.0,
            "target": 1000 * plain.target_s,
            "other": 1000 * plain.other_s,
            "wall": 1000 * plain.wall_s,
        },
        "plain_step_ms": 1000 * plain.wall_s,
    }


def _not_default(given: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """What differs from a dataclass's defaults; nested dataclasses likewise."""
    kept: dict[str, Any] = {}
    for field in fields(default):
        value, usual = given[field.name], getattr(default, field.name)
        if is_dataclass(usual):
            value = _not_default(value, usual)
            usual = {}
        if value != usual:
            kept[field.name] = value
    for arm in kept.get("arms", []):
        for key in [key for key, value in arm.items() if value in (None, {})]:
            del arm[key]
    return kept


def _yaml(config: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    """The configuration that runs the choice."""
    header = (
        f"# The choice of specdec plan: {choice['name']}, predicted to be "
        f"{choice['predicted_speedup']:.2f} times as fast as plain decoding.\n"
        "#\n#   specdec bench bench.yaml --out runs/choice\n"
    )
    return header + OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def choose(
    config: BenchConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    quick: bool = False,
) -> BenchConfig:
    """Let a plan choose the arm; where no drafter pays, there is none, and plain decoding is left.

    Args:
        config: its arms say which drafters there are.
        folder: of the plan; its measured points are kept and used again.
        progress: as in `run_plan`.
        quick: as in `run_plan`.

    Raises:
        ValueError: as in `run_plan`.
        OSError: as in `run_plan`.
    """
    plan = run_plan(config, folder, progress, quick=quick)
    chosen = plan["choice"]
    arms = [ArmConfig(name=chosen["name"], type=chosen["type"], options=chosen["options"])]
    return config.model_copy(update={"arms": [] if chosen["type"] == "plain" else arms})
