"""A whole training run: from a configuration to a folder with a drafter."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from specdec.checkpoints.identity import TARGET, as_json
from specdec.common.config import write_model
from specdec.common.distribution import DISTRIBUTION, install
from specdec.common.files import replace_file, whole_folder
from specdec.train.config import TrainConfig
from specdec.train.data import Materials, OnlineSource, choose_vocabulary, load_materials, seeded
from specdec.train.results import (
    Acceptance,
    DraftVocabulary,
    Evaluation,
    TrainProvenance,
    TrainResults,
)
from specdec.train.trainees import DraftModelTrainee, HeadTrainee, Trainee, new_head
from specdec.verify.tree import from_choices

# What changes the weights. The rest may change between sessions of one run.
_LEARNED = {
    *("per_device_train_batch_size", "num_train_epochs", "max_steps", "seed", "bf16", "fp16"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
}


def run_training(
    config: TrainConfig,
    out: Path,
    callback: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> TrainResults | None:
    """Train a drafter, or go on where a run of the same configuration stopped."""
    _require_packages(config)
    from specdec.train.acceptance import ParityGate, require_parity
    from specdec.train.checkpoint import unsharded, whole_state
    from specdec.train.trainer import Trainer, follow_dtype, training_arguments

    torch.set_num_threads(config.threads)
    arguments = training_arguments(config, out)
    materials = load_materials(config, arguments.device)
    split = materials.split
    follow_dtype(arguments, materials.target.model.dtype, config)
    with seeded(arguments.device, config.training.seed):
        trainee, vocabulary = make_trainee(config, materials)
    source = materials.source(trainee.taps, trainee.dtype)
    identity = _identity(config, materials, arguments.world_size)
    trainer = Trainer(config, trainee, source, split, arguments, identity, callback)
    is_first = trainer.is_world_process_zero()
    if is_first:
        text = yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)
        replace_file(out / "config.yaml", text.encode())
    trainer.run()
    weights = whole_state(trainee.module, is_first)
    with unsharded(trainee):
        if not is_first:
            return None
        gate = expected = None
        if split.validation and config.parity.num_prompts:
            beside = OnlineSource(materials.whole_target(), trainee.taps, trainee.dtype)
            depth = min(config.eval_depth, trainee.max_depth or config.eval_depth)
            shape = from_choices([(0,) * level for level in range(1, depth + 1)])
            gate = ParityGate(beside, split.validation, config.parity, shape)
            expected = gate.predict(trainee, trainer.accelerator.autocast)
    results = _results(trainer, materials, vocabulary, trainee.drafter(out / "drafter"))
    with whole_folder(out / "drafter") as partial:
        trainee.export(partial, results.remembered(), weights)
    if gate is not None and expected is not None:
        measured = gate.measure({**results.drafter, **trainee.chain(config.eval_depth)})
        features = None
        if materials.store is not None:
            ends = [rows[at] for rows in (split.training, split.validation) for at in (0, -1)]
            features = gate.compare_features(source, ends)
        results.parity = gate.compare(expected, measured, features)
        trainee.remember(out / "drafter", results.remembered())
    write_model(out / results.FILE, results)
    require_parity(results)
    return results


def make_trainee(
    config: TrainConfig, materials: Materials
) -> tuple[Trainee, DraftVocabulary | None]:
    """Make what a configuration trains, and tell how much a reduced draft vocabulary covers."""
    chosen, target = config.drafter, materials.target
    if not chosen.is_head:
        return DraftModelTrainee(chosen.options, target, config.loss), None
    size = config.draft_vocab_size
    options = chosen.options | ({} if size is None else {"draft_vocab_size": size})
    head: Any = new_head(chosen.kind, options, chosen.init, target, materials.identity)
    vocabulary = None
    if chosen.init is None and size is not None and size < target.vocab_size:
        tokens, vocabulary = choose_vocabulary(materials.split, size, target.vocab_size)
        head.set_draft_vocab(tokens.to(target.device))
    return HeadTrainee(chosen.kind, head, materials.identity, config.loss), vocabulary


def _require_packages(config: TrainConfig) -> None:
    """Refuse to begin without what the run needs at its end."""
    if find_spec("accelerate") is None:
        raise ValueError(f"training needs accelerate; install it with: {install('train')}")
    from transformers.integrations import get_available_reporting_integrations

    given = config.training.report_to
    known = {"none", "all", *get_available_reporting_integrations()}
    for name in [given] if isinstance(given, str) else given:
        if name not in known:
            raise ValueError(
                f"config training.report_to is {name!r}, which is no tracker or is not installed; "
                f"install it ({DISTRIBUTION}[train] brings tensorboard), or set "
                "training.report_to=none"
            )


def _identity(config: TrainConfig, materials: Materials, num_processes: int) -> dict[str, Any]:
    """Collect what makes a run the same run: never a path, always what is found there."""
    paths: Any = {"data": {"path"}, "target": {"path"}}
    freely = {"threads": True, "parity": True, "training": True}
    target, learned = materials.identity, config.training.model_dump(mode="json", include=_LEARNED)
    return {
        **config.model_dump(mode="json", exclude=paths | freely),
        "training": learned,
        # A step means the same however many processes share its batches.
        "batches_per_step": config.training.gradient_accumulation_steps * num_processes,
        "rows": materials.split.fingerprint,
        "target_weights": target.weights,
        TARGET: as_json(target),
    }


def _results(
    trainer: Any, materials: Materials, vocabulary: DraftVocabulary | None, drafter: dict[str, Any]
) -> TrainResults:
    """Sum a run up; "parity" is to be filled in."""
    plan, steps, split = trainer.plan, trainer.state.global_step, materials.split
    rows = [row for step in range(steps) for row in plan.rows(step)]
    tokens, found = sum(len(row.tokens) for row in rows), trainer.last("evaluation")
    offline, first = {"tau": "offline_tau", "acceptance": "offline_acceptance"}, None
    if begun := trainer.last("evaluation", at=0):
        first = Acceptance.model_validate({key: begun[key] for key in Acceptance.model_fields})
    return TrainResults(
        schema="specdec-train-3",
        provenance=TrainProvenance(config=trainer.config, **materials.where),
        target=materials.identity,
        drafter=drafter,
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        rows=len(split.training),
        validation_rows=len(split.validation),
        dropped_rows=split.num_dropped,
        tokens=tokens,
        answer_tokens=sum(row.num_answer_tokens for row in rows),
        seconds=trainer.seconds,
        tokens_per_s=tokens / trainer.step_seconds,
        num_processes=trainer.args.world_size,
        parameters=sum(weight.numel() for weight in trainer.model.trained.values()),
        loss=trainer.last("step")["loss"],
        draft_vocabulary=vocabulary,
        before=first,
        **{offline.get(key, key): found.get(key) for key in Evaluation.model_fields},
    )
