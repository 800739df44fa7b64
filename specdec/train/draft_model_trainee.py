"""Draft models in training: the whole model, or a LoRA adapter on a whole or an NF4 base."""

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.drafters.adapters import base_mark, merged_adapter, save_adapter
from specdec.drafters.draft_model import check_same_tokenizer
from specdec.drafters.objectives import OBJECTIVES, objective
from specdec.drafters.training_batch import LossOutput, TrainingBatch, shifted
from specdec.targets.load import load_target
from specdec.train.draft_model_options import DraftModelOptions
from specdec.train.training_card import write_training

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
