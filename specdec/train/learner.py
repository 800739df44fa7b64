"""The weights in training and their optimizer, in this process or shared out among several."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.drafters.training_batch import TrainingBatch
from specdec.train.config import TrainConfig
from specdec.train.objective import parameter_groups
from specdec.train.sharding import set_gradient_sync, shard, unsharded, whole, whole_state
from specdec.train.trainee import Trainee, WithLoss


class Learner:
    """Turns losses into steps.

    Args:
        trainee: on the accelerator's device.
        config: of the run.
        accelerator: of this process.

    Raises:
        ValueError: weights that cannot be sharded as the configuration asks.
    """

    def __init__(self, trainee: Trainee, config: TrainConfig, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.model = WithLoss(trainee)
        num_processes = accelerator.num_processes
        self._is_sharded = config.sharding == "fsdp2" and num_processes > 1
        if self._is_sharded:
            units, precision = trainee.units(), accelerator.mixed_precision
            shard(self.model, units, accelerator.device, num_processes, precision)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            fused=True,
        )
        # What is sharded needs accelerate's mixed precision alone, and not its DDP.
        self._wrapped: Any = accelerator.prepare_model(self.model, evaluation_mode=self._is_sharded)
        self._optimizer: Any = accelerator.prepare_optimizer(optimizer)

    def backward(self, batch: TrainingBatch, weight: float, is_last: bool) -> dict[str, Tensor]:
        """Add a batch's share of a step's gradients.

        Args:
            batch: of this process.
            weight: of the batch in the step; the step's weights are 1 over all processes.
            is_last: of the batches of this process. Processes exchange gradients with it alone.

        Returns:
            The batch's share of the loss, as "loss", and of its parts.
        """
        with self._exchange(is_last):
            loss, parts = self._wrapped(batch)
            # Gradients are averaged over processes, and are to be added.
            self._accelerator.backward(loss * weight * self._accelerator.num_processes)
        return {name: part * weight for name, part in {"loss": loss.detach(), **parts}.items()}

    def clip(self, max_norm: float) -> float:
        """Clip the gradients' norm; returns what it was."""
        norm = self._accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return float(whole(norm))

    def step(self, rate: float) -> None:
        """Change the weights by their gradients, and forget those."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def unsharded(self) -> AbstractContextManager[None]:
        """Hold all weights in this process; see `specdec.train.sharding.unsharded`."""
        return unsharded(self.model)

    def weights(self) -> dict[str, Tensor]:
        """Trained weights and buffers on the CPU, in the first process; all call together."""
        return whole_state(self.model.module, self._accelerator.is_main_process)

    def tensors(self) -> dict[str, Tensor]:
        """What training changes, in place: weights and, behind a first step, the optimizer's."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.model.module.named_parameters():
            if weight.requires_grad:
                tensors[f"weight.{name}"] = weight.detach()
                for key, value in self._optimizer.state.get(weight, {}).items():
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def empty_tensors(self) -> dict[str, Tensor]:
        """The same names before a first step, to be filled from a checkpoint."""
        optimizer = self._optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()  # by nothing: the optimizer knows best which tensors it keeps
        optimizer.zero_grad()
        return self.tensors()

    @property
    def scaler(self) -> dict[str, float]:
        """The state of the loss scaler; empty but for float16."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    @scaler.setter
    def scaler(self, state: dict[str, float]) -> None:
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)

    def _exchange(self, is_on: bool) -> AbstractContextManager[Any]:
        if self._is_sharded:
            set_gradient_sync(self.model, is_on)
            return nullcontext()
        return nullcontext() if is_on else self._accelerator.no_sync(self._wrapped)
