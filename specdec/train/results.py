"""What is told of a finished run: `results.json`, and what the drafter remembers of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.checkpoints import TargetIdentity
from specdec.train.config import TrainConfig
from specdec.train.trainer import Trainer


def training_results(
    trainer: Trainer,
    vocabulary: dict[str, Any] | None,
    where: dict[str, Any],
    target: TargetIdentity,
    drafter: dict[str, Any],
) -> dict[str, Any]:
    """The content of `results.json`, see `docs/train.schema.json`; "parity" is to be filled in.

    Args:
        trainer: at its last step.
        vocabulary: size and coverage of a reduced draft vocabulary.
        where: the machine and the code, as they were when the run was started.
        target: whose answers were learned.
        drafter: options of `load_drafter` for what was trained.
    """
    return {
        "schema": "specdec-train-2",
        "provenance": {"config": asdict(trainer.config), **where},
        "target": asdict(target),
        "drafter": drafter,
        **_measured(trainer),
        "draft_vocabulary": vocabulary,
        "parity": None,
    }


def _measured(trainer: Trainer) -> dict[str, Any]:
    split = trainer.split
    progress, step = trainer.progress, trainer.log.last("step")
    assert step is not None
    weights = trainer.trainee.module.parameters()
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    evaluation = trainer.log.last("evaluation") or {}
    return {
        "steps": progress.step,
        "steps_per_epoch": trainer.plan.steps_per_epoch,
        "rows": len(split.training),
        "validation_rows": len(split.validation),
        "dropped_rows": split.num_dropped,
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "seconds": progress.seconds,
        "tokens_per_s": progress.tokens / progress.step_seconds,
        "num_processes": trainer.accelerator.num_processes,
        "parameters": trained,
        "loss": step["loss"],
        "validation_loss": evaluation.get("validation_loss"),
        "offline_tau": evaluation.get("tau"),
        "offline_acceptance": evaluation.get("acceptance"),
        "alpha": evaluation.get("alpha"),
        "acceptance_by_rank": evaluation.get("acceptance_by_rank"),
        "domains": evaluation.get("domains"),
    }


def remembered(config: TrainConfig, results: dict[str, Any]) -> dict[str, Any]:
    """What the drafter says of its training."""
    keys = ("steps", "tokens", "seconds", "loss", "validation_loss", "offline_tau", "alpha")
    lists = ("offline_acceptance", "acceptance_by_rank", "domains", "draft_vocabulary")
    kept = {key: results[key] for key in (*keys, *lists)}
    if (parity := results["parity"]) is not None:
        figures = ("shape", "num_prompts", "measured_tau", "measured_tau_ci", "passed")
        kept["parity"] = {key: parity[key] for key in figures}
    return {"data": Path(config.data.path).name, **kept, "loss_options": config.loss}
