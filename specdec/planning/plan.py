"""`specdec plan`: measure costs, combine them with acceptance, choose, and write the plan."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml

from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.texts import Text, prompt_ids, target_answers
from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.results import BenchProvenance
from specdec.bench.runner import provenance_of
from specdec.bench.workloads import fingerprint_of
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.files import Journal, replace_file
from specdec.engine.scheduler import is_out_of_memory
from specdec.planning.candidates import Candidate, Family, families
from specdec.planning.costs import Costs
from specdec.planning.measure import FULL, QUICK, Effort, Measurements, Progress
from specdec.planning.prediction import Acceptance, Forecast, Prediction
from specdec.planning.results import (
    Configuration,
    Controller,
    Plan,
    PlannedWorkload,
    StepMs,
)
from specdec.planning.search import MARGIN, confirm, schedule, search
from specdec.planning.times import TimedRun, Workload
from specdec.targets.load import load_target

RUNNERS_UP = 5


def run_plan(
    config: BenchConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    quick: bool = False,
) -> Plan:
    """Plan a bench's drafters on this machine; writes `plan.json` and `bench.yaml`.

    Args:
        config: target, prompts, sampling, and arms, which say which drafters there are.
        folder: keeps the measurements in `costs.jsonl`, none of which is made again.
        progress: called with points done, points in all, and what runs next.
        quick: measure few points once, to try things out.

    Raises:
        ValueError: no arm with a drafter, options or settings whose acceptance cannot be worked
            out, or a folder of another plan.
        OSError: the folder cannot be written, or is full; finished points are kept.
    """
    torch.set_num_threads(config.threads)
    planner = _Planner(config, QUICK if quick else FULL, progress)
    checks = {TARGET: partial(check_resumed, folder)}
    with Journal(folder / "costs.jsonl", planner.identity(quick), checks) as journal:
        plan = planner.plan(journal)
    choice = plan.choice
    header = (
        f"# The choice of specdec plan: {choice.name}, predicted to be "
        f"{choice.predicted_speedup:.2f} times as fast as plain decoding.\n"
        "#\n#   specdec bench bench.yaml --out runs/choice\n"
    )
    content = header + yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True)
    replace_file(folder / "bench.yaml", content.encode())
    plan.write(folder)
    return plan


class _Planner:
    """A plan's target, workload and drafters."""

    def __init__(self, config: BenchConfig, effort: Effort, progress: Progress) -> None:
        self.config, self.effort, self.progress = config, effort, progress
        sampling = config.sampling.with_seed(config.seed)
        check_settings(sampling, config.rule)
        self.target = load_target(**config.target.model_dump())
        self.identified = identify_target(self.target)
        _, ids = prompt_ids(config, self.target, progress)
        found = provenance_of(config, fingerprint_of(ids), self.target)
        self.provenance = BenchProvenance.model_validate(found)
        self.work = Workload(ids, sampling, config.max_new_tokens, config.rule)
        self.families = families(config.arms, self.target)

    def identity(self, quick: bool) -> dict[str, object]:
        """Facts that make measured points belong to this plan."""
        kept = ("device", "cpu", "threads", "dtype", "quantized")
        return {
            "plan": self.provenance.config_fingerprint,
            "quick": quick,
            **{key: getattr(self.provenance, key) for key in kept},
            TARGET: as_json(self.identified),
        }

    def plan(self, journal: Journal) -> Plan:
        """Measure, predict, choose."""
        size = self.config.batch_size
        texts = self._texts()
        acceptance = self._acceptance(texts)
        measured = Measurements(self.target, self.work, self.effort, journal, self.progress)
        forward, skipped = measured.forwards(size)
        timed = [candidate for family in self.families for candidate in family.timed()]
        runs = {size: measured.decodings(timed, size, self.effort.rounds)}
        context = sum(len(text.prompt) + len(text.tokens) / 2 for text in texts) / len(texts)
        forecast = Forecast(Costs(forward, runs), acceptance, context, self.config.seed)
        ranked = search(
            [candidate for family in self.families for candidate in family.searched()],
            lambda candidate: forecast(candidate, size),
            lambda candidate, larger: forecast.bound(candidate, size, larger),
            self.effort.finalists,
            self.progress,
        )
        ranked, finals = self._confirm(measured, forecast, ranked, runs)
        best = ranked[0].candidate
        family = next(f for f in self.families if f.name == best.drafter)
        skipped += self._other_batches(measured, list(forward.fits), family, runs)
        costs = Costs(forward, runs, finals, size)
        lengths = schedule(forecast.with_costs(costs), best, sorted(runs))
        pays = ranked[0].speedup > 1 + MARGIN
        return Plan(
            provenance=self.provenance,
            target=self.identified,
            workload=PlannedWorkload(
                prompts=len(texts),
                tokens=sum(len(text.tokens) for text in texts),
                mean_context=context,
            ),
            costs=costs.described(skipped),
            trust=measured.trust([*runs[size], *finals]),
            configurations=[prediction.described() for prediction in ranked],
            choice=ranked[0].described() if pays else _plain(ranked[0]),
            runners_up=[p.described() for p in ranked[pays:][:RUNNERS_UP]],
            schedule=lengths.nodes,
            schedule_predictions=lengths.described(),
            controller=Controller(drafter=best.drafter, step_s=lengths.step_s),
            config=self._config(best if pays else None),
        )

    def _texts(self) -> list[Text]:
        self.progress(0, 1, "the target's own answers")
        work = self.work
        return target_answers(self.target, work.prompts, work.sampling, work.max_new_tokens)

    def _acceptance(self, texts: list[Text]) -> Acceptance:
        """Acceptance along the texts; what none can be worked out for is told first of all."""
        config = self.config
        predictor = Predictor(self.target, texts, self.work.sampling, config.seed, config.rule)
        acceptance = Acceptance(predictor.predict)
        given = [candidate for family in self.families for candidate in family.given]
        for done, candidate in enumerate(given):
            self.progress(done, len(given), f"acceptance of {candidate.name}")
            acceptance(candidate)
        return acceptance

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
            again = forecast.with_costs(Costs(forecast.costs.forward, runs, finals, size))
            return [again(candidate, size) for candidate in candidates]

        return confirm(
            ranked,
            self.effort.finalists,
            lambda candidates: measured.decodings(candidates, size, rounds, "final"),
            predict,
        )

    def _other_batches(
        self,
        measured: Measurements,
        batch_sizes: Sequence[int],
        family: Family,
        runs: dict[int, list[TimedRun]],
    ) -> list[str]:
        """Add the chosen drafter's decodings at the other batch sizes; tell what does not fit."""
        for size in batch_sizes:
            if size in runs:
                continue
            try:
                runs[size] = measured.decodings(family.timed(), size, self.effort.batch_rounds)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                what = f"decoding {size} or more rows with {family.name}"
                return [f"{what} does not fit into memory"]
        return []

    def _config(self, best: Candidate | None) -> dict[str, object]:
        """The bench that runs the choice, without defaults."""
        arms = [ArmConfig(name=best.name, type=best.type, options=best.options)] if best else []
        chosen = self.config.model_copy(update={"arms": arms})
        return chosen.model_dump(exclude_defaults=True)


def _plain(beside: Prediction) -> Configuration:
    """Plain decoding as the choice, where no drafter is worth it."""
    plain = {
        **{"name": "plain", "type": "plain", "options": {}, "is_given": False, "is_timed": True},
        **{"predicted_tau": 1.0, "predicted_tau_ci": None},
        **{"predicted_speedup": 1.0, "predicted_speedup_ci": None},
        "step_ms": StepMs(**beside.plain.ms()),
    }
    return beside.described().model_copy(update=plain)
