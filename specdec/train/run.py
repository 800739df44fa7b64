"""A whole training run: from a configuration to a folder with a drafter."""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from specdec.analysis.offline import DraftShape
from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import TARGET, as_json
from specdec.common.files import replace_file, whole_folder
from specdec.targets.load import find_device
from specdec.train.config import TrainConfig
from specdec.train.data import (
    Materials,
    OnlineSource,
    Split,
    coverage,
    load_materials,
    most_frequent,
    seeded,
)
from specdec.train.heads import HeadTrainee, Trainee, new_head, trained_dtype
from specdec.train.parity import ParityGate, require_parity
from specdec.train.qlora import DraftModelOptions, DraftModelTrainee
from specdec.train.trainer import Trainer

# What may change between sessions of one run: it does not touch what is learned.
_FREE_KEYS = ("threads", "save_every", "log_with", "parity", "sharding")


def run_training(
    config: TrainConfig,
    out: Path,
    callback: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any] | None:
    """Train a drafter, or go on where a killed run of the same configuration stopped.

    Args:
        config: see `load_train_config`.
        out: for checkpoints, `log.jsonl`, `results.json` and the drafter itself.
        callback: called in the first process with steps done, steps in all, and measurements.

    Returns:
        The content of `results.json`; None in processes other than the first.

    Raises:
        FileNotFoundError: no data, or no target.
        ValueError: bad configuration or data, or a folder of another run.
        PermissionError: the folder cannot be written.
        FloatingPointError: the loss or its gradients are not finite.
        Interrupted: SIGTERM or Ctrl-C; the run goes on from a checkpoint.
        OSError: a checkpoint could not be written.
        ParityError: the drafter is accepted otherwise than predicted; everything is written.
    """
    try:
        from accelerate import Accelerator, PartialState
    except ImportError as error:
        raise ValueError(
            "training needs accelerate; install it with: pip install 'specdec[train]'"
        ) from error
    from specdec.train.checkpoint import RunFolder
    from specdec.train.trainer import Trainer

    if config.log_with == "tensorboard" and find_spec("tensorboard") is None:
        raise ValueError(
            "config log_with is 'tensorboard', which is not installed; install it with: "
            "pip install 'specdec[train]', or set log_with=none"
        )
    torch.set_num_threads(config.threads)
    on_cpu = find_device(config.target.device).type == "cpu"
    materials = load_materials(config, PartialState(cpu=on_cpu).device)
    target, split = materials.target, materials.split
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_precision(config, target.model.dtype),
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=out,
    )
    folder = RunFolder(out, _identity(config, materials.identity, split, accelerator.num_processes))
    folder.prepare()
    if accelerator.is_main_process:
        replace_file(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    with seeded(accelerator.device, config.seed):
        trainee, vocabulary = make_trainee(config, target, materials.identity, split)
    source = materials.source(trainee)
    trainer = Trainer(config, trainee, source, split, folder, accelerator)
    trainer.run(callback if accelerator.is_main_process else _ignore)
    weights = trainer.learner.weights()
    with trainer.learner.unsharded():
        if not accelerator.is_main_process:
            return None
        gate = _parity_gate(config, materials, trainee)
        expected = None if gate is None else gate.predict(trainee, accelerator.autocast)
    options = trainee.drafter(out / "drafter")
    results = training_results(trainer, vocabulary, materials.where, materials.identity, options)
    with whole_folder(out / "drafter") as partial:
        trainee.export(partial, remembered(config, results), weights)
    if gate is not None and expected is not None:
        measured = gate.measure({**results["drafter"], **trainee.chain(config.eval_depth)})
        features = None
        if not isinstance(source, OnlineSource):
            ends = [rows[at] for rows in (split.training, split.validation) for at in (0, -1)]
            features = gate.compare_features(source, ends)
        results["parity"] = gate.compare(expected, measured, features)
        trainee.remember(out / "drafter", remembered(config, results))
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    replace_file(out / "results.json", text.encode())
    require_parity(results)
    return results


def _parity_gate(config: TrainConfig, materials: Materials, trainee: Trainee) -> ParityGate | None:
    """For chains as deep as those of the evaluation; None where nothing is held out for it."""
    rows = materials.split.validation
    if not rows or not config.parity.num_prompts:
        return None
    source = OnlineSource(materials.whole_target(), trainee.taps, trained_dtype(trainee))
    depth = min(config.eval_depth, trainee.depth or config.eval_depth)
    return ParityGate(source, rows, config.parity, DraftShape.chain(depth))


def make_trainee(
    config: TrainConfig, target: Any, identity: TargetIdentity, split: Split
) -> tuple[Trainee, dict[str, Any] | None]:
    """What a configuration trains, and the size and coverage of its draft vocabulary.

    Args:
        config: of the run.
        target: what it drafts for, or its two ends.
        identity: of the target.
        split: rows that a reduced draft vocabulary is chosen from.

    Raises:
        FileNotFoundError: no such model or head to start from.
        ValueError: an option that does not exist or cannot be.
    """
    kind, options = config.drafter.kind, dict(config.drafter.options)
    if kind == "draft_model":
        if config.draft_vocab_size is not None:
            raise ValueError("config draft_vocab_size is for eagle3 heads; remove it")
        chosen = DraftModelOptions.from_dict(options)
        return DraftModelTrainee(chosen, target, config.loss), None
    if config.draft_vocab_size is not None:
        options["draft_vocab_size"] = config.draft_vocab_size
    head: Any = new_head(kind, options, config.drafter.init, target, identity)
    vocabulary = None
    if config.drafter.init is None:
        vocabulary = _choose_vocabulary(config, head, target, split)
    return HeadTrainee(kind, head, identity, config.loss), vocabulary


def _ignore(done: int, total: int, text: str) -> None:
    """Show no progress."""


def _precision(config: TrainConfig, dtype: torch.dtype) -> str:
    follows = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    if config.mixed_precision == "no" and follows != "no":
        raise ValueError(
            "config mixed_precision is 'no' but the target is in "
            f"{str(dtype).removeprefix('torch.')}, and heads use its embedding and projection; "
            f"set mixed_precision={follows} or target.dtype=float32"
        )
    return config.mixed_precision or follows


def _choose_vocabulary(
    config: TrainConfig, head: Any, target: Any, split: Split
) -> dict[str, Any] | None:
    """Give the head its draft vocabulary, and say how much of the answers it covers."""
    size, vocab_size = config.draft_vocab_size, target.vocab_size
    if size is None or size >= vocab_size:
        return None
    tokens = most_frequent(split.training, size, vocab_size)
    head.set_draft_vocab(tokens.to(target.device))
    return {
        "size": size,
        "training_coverage": coverage(split.training, tokens, vocab_size),
        "validation_coverage": coverage(split.validation, tokens, vocab_size),
    }


def _identity(
    config: TrainConfig, target: TargetIdentity, split: Split, num_processes: int
) -> dict[str, Any]:
    """What makes a run the same run: never a path, always what is found there."""
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE_KEYS}
    settings["data"].pop("path")
    settings["target"].pop("path")
    # A step means the same however many processes share its batches.
    settings["batches_per_step"] = settings.pop("gradient_accumulation") * num_processes
    known = {"target_weights": target.weights, TARGET: as_json(target)}
    return {**settings, "rows": split.fingerprint, **known}


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
