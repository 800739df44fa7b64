"""`specdec plan`: measure costs, combine them with acceptance, choose, and write the plan."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.texts import prompt_ids, target_answers
from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.results import BenchProvenance
from specdec.bench.runner import provenance_of
from specdec.bench.workloads import Progress, fingerprint_of
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.compile import compile_s
from specdec.common.files import Journal, replace_file
from specdec.engine.scheduler import is_out_of_memory
from specdec.planning.candidates import Family, families
from specdec.planning.choice import MARGIN, Forecast, confirm, schedule, search
from specdec.planning.costs import Costs, to_ms
from specdec.planning.measure import FULL, QUICK, Measurements
from specdec.planning.results import Configuration, Controller, Plan, PlannedWorkload, StepMs
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

    `costs.jsonl` in the folder keeps the measurements, none of which is made again.
    """
    torch.set_num_threads(config.threads)
    sampling = config.sampling.with_seed(config.seed)
    check_settings(sampling, config.rule)
    target = load_target(**config.target.model_dump())
    known = identify_target(target)
    _, ids = prompt_ids(config, target, progress)
    provenance = BenchProvenance(**provenance_of(config, fingerprint_of(ids), target))
    drafters = families(config.arms, target)
    kept = ("device", "cpu", "threads", "dtype", "quantized", "compile_mode")
    identity = {
        "plan": provenance.config_fingerprint,
        "quick": quick,
        **{key: getattr(provenance, key) for key in kept},
        TARGET: as_json(known),
    }
    checks = {TARGET: partial(check_resumed, folder)}
    with Journal(folder / "costs.jsonl", identity, checks) as journal:
        progress(0, 1, "the target's own answers")
        texts = target_answers(target, ids, sampling, config.max_new_tokens)
        predictor = Predictor(target, texts, sampling, config.seed, config.rule)
        measured = Measurements(predictor, QUICK if quick else FULL, journal, progress)
        chosen = _choose(config, drafters, measured)
    if provenance.compile_mode != "eager":
        provenance.compile_s = compile_s()  # until now
    plan = Plan(provenance=provenance, target=known, **chosen)
    head = (
        f"# The choice of specdec plan: {plan.choice.name}, predicted to be "
        f"{plan.choice.predicted_speedup:.2f} times as fast as plain decoding.\n"
        "#\n#   specdec bench bench.yaml --out runs/choice\n"
    )
    content = head + yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True)
    replace_file(folder / "bench.yaml", content.encode())
    plan.write(folder)
    return plan


def _choose(
    config: BenchConfig, drafters: Sequence[Family], measured: Measurements
) -> dict[str, Any]:
    """Measure, predict, choose: the fields of a plan."""
    predict, effort, progress = measured.work.predict, measured.effort, measured.progress
    size, texts = config.batch_size, measured.work.texts
    # What no acceptance can be worked out for is told first of all.
    given = [candidate for family in drafters for candidate in family.given]
    for done, candidate in enumerate(given):
        progress(done, len(given), f"acceptance of {candidate.name}")
        predict(candidate.arm)
    context = sum(len(text.prompt) + len(text.tokens) / 2 for text in texts) / len(texts)
    costs = Costs(measured.forwards(size), context)
    timed = [candidate for family in drafters for candidate in family.timed()]
    runs = measured.decodings(timed, size, effort.rounds)
    costs.add(size, runs)
    forecast = Forecast(costs, predict, config.seed)
    searched = [candidate for family in drafters for candidate in family.searched()]
    ranked = search(forecast, searched, size, effort.finalists, progress)
    # No prompt twice: a drafter that remembers would be flattered.
    rounds = max(1, min(effort.final_rounds, len(texts) // size))
    finalists = [candidate for candidate, _ in ranked[: effort.finalists]]
    finals = measured.decodings(finalists, size, rounds, "final")
    costs.time(size, finals)
    ranked = confirm(forecast, ranked, size, effort.finalists)
    best, fastest = ranked[0]
    family = next(each for each in drafters if each.base.drafter == best.drafter)
    _add_other_batches(costs, family, measured)
    nodes, lengths, step_s = schedule(forecast, best, sorted(costs.plain))
    pays = fastest.predicted_speedup > 1 + MARGIN
    arms = [ArmConfig(name=best.name, type=best.type, options=best.options)] if pays else []
    configurations = [configuration for _, configuration in ranked]
    return {
        "workload": PlannedWorkload(
            prompts=len(texts),
            tokens=sum(len(text.tokens) for text in texts),
            mean_context=context,
        ),
        "costs": costs.measured,
        "trust": measured.trust([*runs, *finals]),
        "configurations": configurations,
        "choice": fastest if pays else _plain(fastest, costs),
        "runners_up": configurations[pays:][:RUNNERS_UP],
        "schedule": nodes,
        "schedule_predictions": lengths,
        "controller": Controller(drafter=best.drafter, step_s=step_s),
        # The bench that runs the choice, without defaults.
        "config": config.model_copy(update={"arms": arms}).model_dump(exclude_defaults=True),
    }


def _add_other_batches(costs: Costs, family: Family, measured: Measurements) -> None:
    """Add the chosen drafter's decodings at the other batch sizes; what does not fit is named."""
    for size in [size for size in costs.measured.forward if size not in costs.plain]:
        try:
            costs.add(size, measured.decodings(family.timed(), size, measured.effort.batch_rounds))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            what = f"decoding {size} or more rows with {family.base.drafter}"
            costs.measured.skipped.append(f"{what} does not fit into memory")
            return


def _plain(beside: Configuration, costs: Costs) -> Configuration:
    """Plain decoding as the choice, where no drafter is worth it."""
    plain = {
        **{"name": "plain", "type": "plain", "options": {}, "is_given": False, "is_timed": True},
        **{"predicted_tau": 1.0, "predicted_tau_ci": None},
        **{"predicted_speedup": 1.0, "predicted_speedup_ci": None},
        "step_ms": StepMs(**to_ms(costs.plain[beside.batch_size])),
    }
    return beside.model_copy(update=plain)
