"""Draft models in training: the whole model, or a LoRA adapter on a whole or an NF4 base."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.config import Config, validated
from specdec.common.files import write_json
from specdec.demo import demo_path
from specdec.drafters.adapters import base_mark, merged_adapter, save_adapter
from specdec.drafters.draft_model import check_same_tokenizer
from specdec.drafters.training import TrainingBatch, objective, shifted
from specdec.targets.load import load_target
from specdec.train.heads import Trainee

Count = Annotated[int, Field(ge=1)]


class DraftModelOptions(Config):
    """Options under `drafter.options` of a draft model.

    Attributes:
        path: the model to start from: "demo", a folder or a hub id.
        method: "full" trains all weights; "lora" a low-rank adapter on the model as it is; "qlora"
            the same on a base in 4-bit NF4, through bitsandbytes.
        rank: rank of the adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: dropout of the adapter's input.
        targets: modules that are adapted: "all-linear", or the ends of their names.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about
            a third more time.
        export: "merged" writes a plain model that every engine reads; a 4-bit base is dequantized
            first, because merging into four bits rounds much of the adapter away. "adapter" writes
            the adapter alone.
        dtype: dtype of the base; None: float32 on a CPU and for "full", else the checkpoint's own.
    """

    path: str = "demo"
    method: Literal["full", "lora", "qlora"] = "qlora"
    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    export: Literal["merged", "adapter"] = "merged"
    dtype: str | None = None

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.method == "full" and self.export == "adapter":
            raise ValueError("export is 'adapter', but method 'full' makes none; use export=merged")
        return self

    def load(self, device: torch.device) -> Any:
        """Load the model to start from, an `HFTarget`; "demo" is the embedded draft model."""
        path = str(demo_path("draft")) if self.path == "demo" else self.path
        # Small steps are lost in half precision; autocast computes in it where asked.
        dtype = self.dtype or ("float32" if self.method == "full" else None)
        quantization = "4bit" if self.method == "qlora" else None
        return load_target(path, dtype=dtype, device=device, quantization=quantization)

    def prepared(self, model: Any) -> Any:
        """Return the model with what is to be trained, in train mode."""
        reentrant = {"use_reentrant": False}
        if self.method == "full":
            model.requires_grad_(True)
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(reentrant)
            return model.train()
        try:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        except ImportError as error:
            raise ValueError(
                f"drafter.options.method {self.method!r} needs peft; install it with: "
                "pip install 'specdec[train]'"
            ) from error
        if self.method == "qlora":
            model = prepare_model_for_kbit_training(model, self.gradient_checkpointing, reentrant)
        elif self.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(reentrant)
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
    """Options of the loss: what is minimized, and the temperature of both distributions."""

    objective: Literal["cross_entropy", "forward_kl", "reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0


class DraftModelTrainee(Trainee):
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
        mark, dtype = base_mark(loaded.model), loaded.model.dtype
        super().__init__("draft_model", chosen.prepared(loaded.model), loss.model_dump())
        self.options, self.tokenizer = chosen, loaded.tokenizer
        self._base_mark, self._base_dtype = mark, dtype

    @property
    def _no_split_modules(self) -> Any:
        """Decoder layers, which are sharded each by itself; accelerate asks for this name."""
        return self.module._no_split_modules

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean of the objective over the answers' tokens."""
        mask = shifted(batch.loss_mask, 1)  # place i says t_{i+1}
        tokens = shifted(batch.tokens, 1)[mask]
        name, temperature = self.loss_options["objective"], self.loss_options["temperature"]
        goal = batch.target_logits[mask]
        loss = objective(name, self._logits(batch)[mask], goal, tokens, temperature)
        return loss, {name: loss.detach()}

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """See `Trainee`: as long as a draft is right, its context is the text itself."""
        logits = self._logits(batch)
        best = logits.topk(min(width, logits.shape[-1]), -1).indices
        return torch.stack([shifted(best, 1 + level) for level in range(depth)], 2)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """See `Trainee`."""
        logits = shifted(self._logits(batch), 1)[mask]
        missing = batch.target_logits.shape[-1] - logits.shape[-1]
        return pad(logits, (0, missing), value=float("-inf"))  # a negative number crops

    def _logits(self, batch: TrainingBatch) -> Tensor:
        positions = {} if batch.positions is None else {"position_ids": batch.positions}
        logits: Tensor = self.module(input_ids=batch.tokens, use_cache=False, **positions).logits
        return logits

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write a plain checkpoint, or an adapter beside the name of its base."""
        keeps_adapter = self.options.export == "adapter"
        if keeps_adapter:
            save_adapter(self.module, folder, weights, self._base_mark)
        elif self.options.method == "full":
            self.module.save_pretrained(folder, state_dict=weights)
        else:
            merged_adapter(self.module, self._plain_base(), weights).save_pretrained(folder)
        if self.tokenizer is not None and not keeps_adapter:
            self.tokenizer.save_pretrained(folder)
        self.remember(folder, training)

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """See `Trainee`."""
        write_json(folder / "training.json", training)

    def _plain_base(self) -> Any:
        """Return what an adapter is merged into: never four bits, and nothing that is sharded."""
        if self.options.method == "qlora":
            return copy.deepcopy(self.module).unload().dequantize()
        dtype = str(self._base_dtype).removeprefix("torch.")
        return self.options.model_copy(update={"dtype": dtype}).load(torch.device("cpu")).model

    def drafter(self, folder: Path) -> dict[str, Any]:
        """See `Trainee`."""
        if self.options.export == "merged":
            return super().drafter(folder)
        quantization = {"quantization": "4bit"} if self.options.method == "qlora" else {}
        named = {"type": self.kind, "path": self.options.path, "adapter": str(folder)}
        return named | quantization

    def chain(self, depth: int) -> dict[str, Any]:
        """See `Trainee`."""
        return {"num_draft_tokens": depth}
