"""What is told of a finished run: `results.json`, and what the head remembers of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.train.config import TrainConfig
from specdec.train.trainer import Trainer


def training_results(
    trainer: Trainer, vocabulary: dict[str, Any] | None, where: dict[str, Any]
) -> dict[str, Any]:
    """The content of `results.json`, see `docs/train.schema.json`.

    Args:
        trainer: at its last step.
        vocabulary: size and coverage of a reduced draft vocabulary.
        where: the machine and the code, as they were when the run was started.
    """
    return {
        "schema": "specdec-train-1",
        "provenance": {"config": asdict(trainer.config), **where},
        **_measured(trainer),
        "draft_vocabulary": vocabulary,
    }


def _measured(trainer: Trainer) -> dict[str, Any]:
    split = trainer.split
    progress, step = trainer.progress, trainer.log.last("step")
    assert step is not None
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
        "parameters": sum(weight.numel() for weight in trainer.head.parameters()),
        "loss": step["loss"],
        "validation_loss": evaluation.get("validation_loss"),
        "offline_tau": evaluation.get("tau"),
        "offline_acceptance": evaluation.get("acceptance"),
        "acceptance_by_rank": evaluation.get("acceptance_by_rank"),
    }


def remembered(config: TrainConfig, results: dict[str, Any]) -> dict[str, Any]:
    """What the head's checkpoint says of its training."""
    keys = ("steps", "tokens", "seconds", "loss", "validation_loss", "offline_tau")
    lists = ("offline_acceptance", "acceptance_by_rank", "draft_vocabulary")
    kept = {key: results[key] for key in (*keys, *lists)}
    return {"data": Path(config.data.path).name, **kept, "loss_options": config.loss}
