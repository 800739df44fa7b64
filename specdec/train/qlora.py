"""Draft models in training: the whole model, or a LoRA adapter on a whole or an NF4 base."""

import copy
import json
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.common.files import replace_file
from specdec.demo import demo_path
from specdec.drafters.adapters import base_mark, merged_adapter, save_adapter
from specdec.drafters.draft_model import check_same_tokenizer
from specdec.drafters.training import OBJECTIVES, LossOutput, TrainingBatch, objective, shifted
from specdec.targets.load import load_target

METHODS = ("full", "lora", "qlora")
EXPORTS = ("merged", "adapter")


@dataclass(frozen=True)
class DraftModelOptions:
    """Options under `drafter.options` of a draft model.

    Attributes:
        path: the model to start from: "demo", a folder or a hub id.
        method: "full" trains all weights; "lora" a low-rank adapter on the model as it is; "qlora"
            the same on a base in 4-bit NF4, through bitsandbytes.
        rank: of the adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: of the adapter's input.
        targets: modules that are adapted: "all-linear", or the ends of their names.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about
            a third more time.
        export: "merged" writes a plain model that every engine reads; a 4-bit base is dequantised
            first, because merging into four bits rounds much of the adapter away. "adapter" writes
            the adapter alone.
        dtype: of the base; None: float32 on a CPU and for "full", else the checkpoint's own.
    """

    path: str = "demo"
    method: str = "qlora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    export: str = "merged"
    dtype: str | None = None

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Check and take options.

        Raises:
            ValueError: an option that does not exist or is out of its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise ValueError(
                f"config drafter.options.{unknown} is no option of a draft model; known: "
                f"{', '.join(known)}"
            )
        options = cls(**given)
        for name, choices in (("method", METHODS), ("export", EXPORTS)):
            value = getattr(options, name)
            if value not in choices:
                raise ValueError(
                    f"config drafter.options.{name} is {value!r} but must be one of "
                    f"{', '.join(choices)}"
                )
        for name in ("rank", "alpha"):
            value = getattr(options, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"config drafter.options.{name} is {value!r} but must be at least 1"
                )
        if not 0 <= options.dropout < 1:
            raise ValueError(
                f"config drafter.options.dropout is {options.dropout} but must be in [0, 1)"
            )
        if options.method == "full" and options.export == "adapter":
            raise ValueError(
                "config drafter.options.export is 'adapter', but method 'full' makes none; use "
                "export=merged"
            )
        if options.method == "full" and options.dtype is None:
            # Small steps are lost in half precision; autocast computes in it where asked.
            return cls(**{**given, "dtype": "float32"})
        return options

    @property
    def model_path(self) -> str:
        """Where the model to start from lies; "demo" is the embedded draft model."""
        return str(demo_path("draft")) if self.path == "demo" else self.path

    @property
    def keeps_adapter(self) -> bool:
        """Whether the adapter is written alone."""
        return self.export == "adapter"

    def prepared(self, model: Any) -> Any:
        """The model with what is to be trained, in train mode.

        Args:
            model: a transformers causal LM, loaded as `method` asks.

        Raises:
            ValueError: peft is not installed, or cannot adapt this model.
        """
        if self.method == "full":
            model.requires_grad_(True)
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            return model.train()
        try:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        except ImportError as error:
            raise ValueError(
                f"drafter.options.method {self.method!r} needs peft; install it with: "
                "pip install 'specdec[train]'"
            ) from error
        if self.method == "qlora":
            model = prepare_model_for_kbit_training(
                model, self.gradient_checkpointing, {"use_reentrant": False}
            )
        elif self.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
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


def write_training(folder: Path, training: dict[str, Any]) -> None:
    """Write `training.json`."""
    text = json.dumps(training, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "training.json", text.encode())


_LOSS_OPTIONS = ("objective", "temperature")


class DraftModelTrainee:
    """A causal LM that learns to say what the target says.

    Args:
        options: see `DraftModelOptions`.
        target: what it drafts for.
        loss_options: "objective", one of `OBJECTIVES` (default "forward_kl"), and "temperature".

    Raises:
        FileNotFoundError: no such model.
        ValueError: an option that cannot be, or another tokenizer than the target's.

    Source: QLoRA, arXiv 2305.14314; distilling drafters: DistillSpec, arXiv 2310.08461.
    """

    kind = "draft_model"
    taps: tuple[int, ...] = ()
    depth: int | None = None

    def __init__(
        self, options: DraftModelOptions, target: Any, loss_options: dict[str, Any]
    ) -> None:
        self._options = options
        self._objective, self._temperature = _checked(loss_options)
        quantization = "4bit" if options.method == "qlora" else None
        loaded = load_target(
            options.model_path, dtype=options.dtype, device=target.device, quantization=quantization
        )
        check_same_tokenizer(loaded.tokenizer, target.tokenizer, options.path)
        self.tokenizer = loaded.tokenizer
        self._base_mark, self._dtype = base_mark(loaded.model), loaded.model.dtype
        self.module: Any = options.prepared(loaded.model)

    def loss(self, batch: TrainingBatch) -> LossOutput:
        """Mean of the objective over the answers' tokens."""
        mask = shifted(batch.loss_mask, 1)  # place i says t_{i+1}
        tokens = shifted(batch.tokens, 1)[mask]
        logits = self._logits(batch)[mask]
        goal = batch.target_logits[mask]
        loss = objective(self._objective, logits, goal, tokens, self._temperature)
        return LossOutput(loss, {self._objective: loss.detach()})

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

    def units(self) -> list[nn.Module]:
        """The decoder layers."""
        lists = [list(m) for m in self.module.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len)

    def export(self, folder: Path, training: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """A plain checkpoint, or an adapter beside the name of its base."""
        if self._options.keeps_adapter:
            save_adapter(self.module, folder, weights, self._base_mark)
        elif self._options.method == "full":
            self.module.save_pretrained(folder, state_dict=weights)
        else:
            merged_adapter(self.module, self._plain_base(), weights).save_pretrained(folder)
        if self.tokenizer is not None and not self._options.keeps_adapter:
            self.tokenizer.save_pretrained(folder)
        write_training(folder, training)

    def remember(self, folder: Path, training: dict[str, Any]) -> None:
        """See `Trainee`."""
        write_training(folder, training)

    def _plain_base(self) -> Any:
        """What an adapter is merged into: never four bits, and no module that may be sharded."""
        if self._options.method == "qlora":
            return copy.deepcopy(self.module).unload().dequantize()
        return load_target(self._options.model_path, dtype=self._dtype, device="cpu").model

    def drafter(self, folder: Path) -> dict[str, Any]:
        """See `Trainee`."""
        if not self._options.keeps_adapter:
            return {"type": self.kind, "path": str(folder)}
        quantization = {"quantization": "4bit"} if self._options.method == "qlora" else {}
        return {
            "type": self.kind,
            "path": self._options.path,
            "adapter": str(folder),
            **quantization,
        }

    def chain(self, depth: int) -> dict[str, Any]:
        """See `Trainee`."""
        return {"num_draft_tokens": depth}


def _checked(options: dict[str, Any]) -> tuple[str, float]:
    """The objective and its temperature."""
    unknown = next((name for name in options if name not in _LOSS_OPTIONS), None)
    if unknown is not None:
        raise ValueError(
            f"config loss.{unknown} is no option of the draft_model loss; known: "
            f"{', '.join(_LOSS_OPTIONS)}"
        )
    name = options.get("objective", "forward_kl")
    if name not in OBJECTIVES:
        raise ValueError(
            f"config loss.objective is {name!r} but must be one of {', '.join(OBJECTIVES)}"
        )
    temperature = options.get("temperature", signature(objective).parameters["temperature"].default)
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"config loss.temperature is {temperature!r} but must be above 0")
    return name, float(temperature)
