"""The training loop of draft heads: one process or several, killed and resumed at will."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.checkpoints import HeadCheckpoint, identify_target, resolved_options
from specdec.data.answers import AnswerRow
from specdec.drafters.heads import fill_head, head_loss
from specdec.drafters.training_batch import TrainingBatch
from specdec.targets.hf import HFTarget
from specdec.train.batches import StepPlan, collate
from specdec.train.config import TrainConfig
from specdec.train.data import Split
from specdec.train.evaluate import evaluate
from specdec.train.log import TrainLog
from specdec.train.objective import HeadWithLoss, parameter_groups, seeded
from specdec.train.schedule import learning_rate
from specdec.train.state import Progress, RunFolder
from specdec.train.target_view import view

Callback = Callable[[int, int, str], None]


class Trainer:
    """A run from its newest checkpoint to its last step.

    Args:
        config: of the run.
        head: new, on the accelerator's device.
        target: frozen.
        split: the rows.
        folder: where checkpoints go.
        accelerator: of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        head: Any,
        target: HFTarget,
        split: Split,
        folder: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.head, self.target, self.split = config, head, target, split
        self.folder, self.accelerator = folder, accelerator
        self.plan = StepPlan(
            [len(row.tokens) for row in split.training],
            config.batch_size,
            config.gradient_accumulation,
            accelerator.num_processes,
            config.seed,
        )
        epochs = config.num_epochs or 1
        self.num_steps = config.max_steps or epochs * self.plan.steps_per_epoch
        model = HeadWithLoss(config.head.kind, head, config.loss)
        self.model, self.optimizer = accelerator.prepare(
            model,
            torch.optim.AdamW(
                parameter_groups(model, config.weight_decay),
                lr=config.lr,
                betas=(config.betas[0], config.betas[1]),
                fused=True,
            ),
        )
        self.progress = Progress()
        self._identity = identify_target(target)
        self._resume()
        is_writer = accelerator.is_main_process
        self.log = TrainLog(folder.folder / "log.jsonl", self.progress.step, is_writer)

    def checkpoint(self, training: dict[str, Any] | None = None) -> HeadCheckpoint:
        """The head as it is now.

        Args:
            training: how it was trained, JSON values.
        """
        tensors = {name: each.detach().cpu() for name, each in self.head.state_dict().items()}
        return HeadCheckpoint(
            kind=self.config.head.kind,
            options=resolved_options(self.head),
            tensors=tensors,
            target=self._identity,
            training=training or {},
        )

    def run(self, callback: Callback) -> None:
        """Train to the last step, evaluating and saving on the way and at the end.

        Args:
            callback: given steps done, steps in all, and what was measured.

        Raises:
            FloatingPointError: the loss or its gradients are not finite; checkpoints are kept.
        """
        if self.config.log_with != "none":
            purge = {"purge_step": self.progress.step + 1}
            tracker = self.config.log_with
            self.accelerator.init_trackers(tracker, init_kwargs={tracker: purge})
        try:
            self._run(callback)
        finally:
            self.log.close()
            self.accelerator.end_training()

    def _run(self, callback: Callback) -> None:
        before, started = self.progress.seconds, time.monotonic()
        while self.progress.step < self.num_steps:
            self._log(self._step())
            step, is_last = self.progress.step, self.progress.step == self.num_steps
            if self.split.validation and (is_last or _is_due(step, self.config.eval_every)):
                self._log({"kind": "evaluation", "step": step} | self._evaluate())
            self.progress.seconds = before + time.monotonic() - started
            if is_last or _is_due(step, self.config.save_every):
                self._save()
            callback(step, self.num_steps, self._summary())

    def _step(self) -> dict[str, Any]:
        """One optimizer step; its line of the log."""
        started, config = time.monotonic(), self.config
        index = self.progress.step
        batches = [[self.split.training[n] for n in b] for b in self.plan.batches(index)]
        rate = learning_rate(index, config.lr, config.warmup_steps, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._accumulate(index, batches)
        norm = float(
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        )
        self._require_finite(index + 1, losses["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        rows = [row for batch in batches for row in batch]
        num_tokens, seconds = sum(len(row.tokens) for row in rows), time.monotonic() - started
        before = self.progress
        self.progress = replace(
            before,
            step=index + 1,
            tokens=before.tokens + num_tokens,
            answer_tokens=before.answer_tokens + sum(row.num_answer_tokens for row in rows),
            step_seconds=before.step_seconds + seconds,
        )
        record = {"kind": "step", "step": index + 1, **losses, "lr": rate}
        known_norm = norm if math.isfinite(norm) else None
        return record | {"grad_norm": known_norm, "tokens_per_s": num_tokens / seconds}

    def _accumulate(self, index: int, batches: list[list[AnswerRow]]) -> dict[str, float]:
        """Gradients of a step, each process from its own batches; the losses of all of them."""
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        counts = [sum(row.num_answer_tokens for row in rows) for rows in batches]
        mine = range(rank, len(batches), world)
        sums: dict[str, Tensor] = {}
        for place in mine:
            # Processes exchange gradients once a step, with their last batch.
            gradients = nullcontext() if place == mine[-1] else accelerator.no_sync(self.model)
            with gradients, seeded(accelerator.device, self.config.seed, index, place):
                parts = self._backward(batches[place], counts[place] / sum(counts))
            sums = {name: sums.get(name, 0) + part for name, part in parts.items()}
        return self._reduced(sums)

    def _backward(self, rows: list[AnswerRow], weight: float) -> dict[str, Tensor]:
        """Add a batch's share of the step's gradients; its share of the losses.

        Args:
            rows: of the batch.
            weight: its share of the step's answer tokens. Processes' gradients are averaged, so
                each one counts as many times as there are processes.
        """
        batch = collate(rows, self.accelerator.device)
        loss, parts = self.model(view(self.target, self.head.taps, batch, self._dtype))
        self.accelerator.backward(loss * weight * self.accelerator.num_processes)
        return {name: part * weight for name, part in {"loss": loss.detach(), **parts}.items()}

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.head.parameters()).dtype

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over all processes."""
        stacked = torch.stack([each.float() for each in sums.values()])
        values = self.accelerator.reduce(stacked, "sum").tolist()
        return dict(zip(sums, values, strict=True))

    def _require_finite(self, step: int, loss: float, norm: float) -> None:
        # Under float16 the loss scaler skips a step whose scaled gradients overflow.
        is_scaled = self.accelerator.scaler is not None
        if math.isfinite(loss) and (is_scaled or math.isfinite(norm)):
            return
        raise FloatingPointError(
            f"step {step}: the loss is {loss} and its gradients' norm {norm}; both must be finite. "
            f"The newest checkpoint in {str(self.folder.folder)!r} is intact; lower lr or "
            "max_grad_norm, or train in float32, into another --out folder"
        )

    def _evaluate(self) -> dict[str, Any]:
        def loss(batch: TrainingBatch, place: int) -> Tensor:
            with seeded(self.accelerator.device, self.config.seed, place):
                return head_loss(self.config.head.kind, self.head, batch, **self.config.loss).loss

        config = self.config
        return evaluate(
            self.head,
            loss,
            self.target,
            self.split.validation,
            batch_size=config.batch_size,
            depth=config.eval_depth,
            accelerator=self.accelerator,
        )

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            states = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                states["scaler"] = self.accelerator.scaler.state_dict()
            self.folder.save(self.progress, self.checkpoint(asdict(self.progress)), states)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        saved = self.folder.load()
        if saved is None:
            return
        self.progress = saved.progress
        fill_head(self.head, saved.head.tensors, str(self.folder.folder))
        self.optimizer.load_state_dict(saved.states["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in saved.states:
            self.accelerator.scaler.load_state_dict(saved.states["scaler"])

    def _log(self, record: dict[str, Any]) -> None:
        self.log.add(record)
        values = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        self.accelerator.log(values, step=record["step"])

    def _summary(self) -> str:
        """The newest measurements, for a progress bar."""
        step, evaluation = self.log.last("step"), self.log.last("evaluation")
        assert step is not None
        speed = self.progress.tokens / max(self.progress.step_seconds, 1e-9)
        tau = f", offline tau {evaluation['tau']:.2f}" if evaluation else ""
        return f"loss {step['loss']:.3f}, {speed:.0f} tokens/s{tau}"


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
