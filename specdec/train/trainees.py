"""Drafters in training: heads, and draft models as a whole or by a LoRA adapter."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.checkpoints import HeadCheckpoint, TargetIdentity, check_target, read_head, write_head
from specdec.common.config import Config, validated
from specdec.common.distribution import install
from specdec.common.files import write_json
from specdec.demo import demo_path
from specdec.drafters.draft_model import (
    base_mark,
    check_same_tokenizer,
    merged_adapter,
    save_adapter,
)
from specdec.drafters.heads import Head, build_head, fill_head
from specdec.drafters.training import TrainingBatch, objective, shifted
from specdec.targets.load import load_target
from specdec.train.config import Count


class _Trainee(nn.Module):
    """A drafter in training, whose forward is its loss, so that wrappers see all of it."""

    taps: tuple[int, ...] = ()  # HF `hidden_states` indices that its batches must hold
    max_depth: int | None = None  # levels of the chains that it can draft; None for any

    def __init__(self, kind: str, module: nn.Module, loss_options: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.module, self.loss_options = kind, module, loss_options

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the module."""
        return {n: w for n, w in self.module.named_parameters() if w.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.trained.values())).dtype

    def drafter(self, folder: Path) -> dict[str, Any]:
        return {"type": self.kind, "path": str(folder)}


class HeadTrainee(_Trainee):
    """A head, whose `candidates` and `guesses` are the trainee's."""

    module: Head

    def __init__(
        self, kind: str, head: Head, identity: TargetIdentity, loss_options: Mapping[str, Any]
    ) -> None:
        known = head.loss_options()
        for name in loss_options.keys() - known.keys():
            raise ValueError(
                f"config loss.{name} is no option of the {kind} loss; known: {', '.join(known)}"
            )
        last, highest = identity.num_layers, max(head.taps, default=0)
        if last is not None and highest > last:
            raise ValueError(
                f"the head reads hidden_states[{highest}] but the target has only 0 to {last}; set "
                "drafter.options.taps to some of these"
            )
        super().__init__(kind, head, loss_options)
        self.taps, self.max_depth, self.identity = tuple(head.taps), head.max_depth, identity
        self.candidates, self.guesses = head.candidates, head.guesses

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.module.loss(batch, **self.loss_options)
        return result.loss, result.parts

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the head with `weights`, which are whole where its own may be spread out."""
        options = self.module.options.model_dump(exclude_none=True)
        facts: dict[str, Any] = {"target": self.identity, "training": training}
        write_head(HeadCheckpoint(self.kind, options, weights, **facts), folder)

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        write_head(replace(read_head(folder), training=training), folder)

    def chain(self, depth: int) -> dict[str, Any]:
        """Return options of `load_drafter` that make it draft chains."""
        levels = min(depth, self.max_depth or depth)
        return {"choices": [[0] * (level + 1) for level in range(levels)]}


def new_head(
    kind: str, options: dict[str, Any], init: str | None, target: Any, identity: TargetIdentity
) -> Head:
    """Build a head to train: new, or as a checkpoint left it."""
    if init is None:
        return build_head(kind, options, target)
    checkpoint = read_head(init)
    if checkpoint.kind != kind:
        raise ValueError(
            f"config drafter.init {init!r} holds a head of the kind {checkpoint.kind!r}, not "
            f"{kind!r}; set drafter.kind={checkpoint.kind}"
        )
    check_target(checkpoint, identity)
    own = checkpoint.options
    if other := sorted(name for name, value in options.items() if own.get(name) != value):
        raise ValueError(
            f"config drafter.options {other} are not those of drafter.init {init!r}, and a head "
            "keeps its own; remove them (or draft_vocab_size)"
        )
    head = build_head(kind, own, target)
    fill_head(head, checkpoint.tensors, init)
    return head


class DraftModelOptions(Config):
    """Options under `drafter.options` of a draft model; docs/training.md describes them."""

    path: str = "demo"
    method: Literal["full", "lora", "qlora"] = "qlora"
    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    export: Literal["merged", "adapter"] = "merged"
    dtype: str | None = None  # of the base: float32 on a CPU and for "full", else its own

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.method == "full" and self.export == "adapter":
            raise ValueError("export is 'adapter', but method 'full' makes none; use export=merged")
        return self

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """Load the model to start from, an `HFTarget`; "demo" is the embedded draft model."""
        path = str(demo_path("draft")) if self.path == "demo" else self.path
        # Small steps are lost in half precision; autocast computes in it where asked.
        chosen = dtype or self.dtype or ("float32" if self.method == "full" else None)
        quantization = "4bit" if self.method == "qlora" else None
        return load_target(path, dtype=chosen, device=device, quantization=quantization)

    def prepared(self, model: Any) -> Any:
        """Return the model with what is to be trained, in train mode."""
        reentrant = {"use_reentrant": False}
        if self.gradient_checkpointing and self.method != "qlora":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(reentrant)
        if self.method == "full":
            return model.requires_grad_(True).train()
        try:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        except ImportError as error:
            fix = f"install it with: {install('train')}"
            raise ValueError(f"drafter.options.method {self.method!r} needs peft; {fix}") from error
        if self.method == "qlora":
            model = prepare_model_for_kbit_training(model, self.gradient_checkpointing, reentrant)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config).train()
        except ValueError as error:
            raise ValueError(f"config drafter.options.targets {self.targets!r}: {error}") from error


class DraftModelLoss(Config):
    """Objective, and the temperature that both distributions are compared at."""

    objective: str = "forward_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0


class DraftModelTrainee(_Trainee):
    """A causal LM that learns to say what the target says.

    Source: QLoRA, arXiv 2305.14314; distilling drafters: DistillSpec, arXiv 2310.08461.
    """

    module: Any

    def __init__(
        self, options: Mapping[str, Any], target: Any, loss_options: Mapping[str, Any]
    ) -> None:
        chosen = validated(DraftModelOptions, options, "config drafter.options")
        loss = validated(DraftModelLoss, loss_options, "config loss")
        loaded = chosen.load(target.device)
        check_same_tokenizer(loaded.tokenizer, target.tokenizer, chosen.path)
        self._base_mark, self._base_dtype = base_mark(loaded.model), loaded.model.dtype
        super().__init__("draft_model", chosen.prepared(loaded.model), loss.model_dump())
        self.options, self.tokenizer = chosen, loaded.tokenizer

    @property
    def _no_split_modules(self) -> Any:
        """Decoder layers, which accelerate shards each by itself."""
        return self.module._no_split_modules

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = shifted(batch.loss_mask, 1)  # place i says t_{i+1}
        tokens, goal = shifted(batch.tokens, 1)[mask], batch.target_logits[mask]
        name, temperature = self.loss_options["objective"], self.loss_options["temperature"]
        loss = objective(name, self._logits(batch)[mask], goal, tokens, temperature)
        return loss, {name: loss.detach()}

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """As long as a draft is right, its context is the text itself."""
        logits = self._logits(batch)
        best = logits.topk(min(width, logits.shape[-1]), -1).indices
        return torch.stack([shifted(best, 1 + level) for level in range(depth)], 2)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        logits = shifted(self._logits(batch), 1)[mask]
        missing = batch.target_logits.shape[-1] - logits.shape[-1]
        return pad(logits, (0, missing), value=float("-inf"))  # a negative number crops

    def _logits(self, batch: TrainingBatch) -> Tensor:
        given = {"input_ids": batch.tokens, "position_ids": batch.positions}
        logits: Tensor = self.module(**given, use_cache=False).logits
        return logits

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write a plain checkpoint, or an adapter beside the name of its base."""
        if self.options.export == "adapter":
            save_adapter(self.module, folder, weights, self._base_mark)
        else:
            if self.options.method == "full":
                self.module.save_pretrained(folder, state_dict=weights)
            else:
                merged_adapter(self.module, self._plain_base(), weights).save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        self.remember(folder, training)

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        write_json(folder / "training.json", training)

    def _plain_base(self) -> Any:
        """Return what an adapter is merged into: never four bits, and nothing that is sharded."""
        if self.options.method == "qlora":
            return copy.deepcopy(self.module).unload().dequantize()
        return self.options.load(torch.device("cpu"), self._base_dtype).model

    def drafter(self, folder: Path) -> dict[str, Any]:
        options = super().drafter(folder)
        if self.options.export == "adapter":
            options |= {"path": self.options.path, "adapter": str(folder)}
            options |= {"quantization": "4bit"} if self.options.method == "qlora" else {}
        return options

    def chain(self, depth: int) -> dict[str, Any]:
        return {"num_draft_tokens": depth}


Trainee = HeadTrainee | DraftModelTrainee
