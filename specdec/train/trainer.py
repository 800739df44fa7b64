"""The training loop of drafters: one process or several, killed and resumed at will."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.train.batches import Layout, StepPlan, packed, padded
from specdec.train.config import TrainConfig
from specdec.train.data import Split
from specdec.train.evaluate import evaluate
from specdec.train.log import TrainLog
from specdec.train.objective import parameter_groups, seeded
from specdec.train.schedule import learning_rate
from specdec.train.source import Source
from specdec.train.state import Progress, RunFolder
from specdec.train.trainee import Trainee, WithLoss

Callback = Callable[[int, int, str], None]


class Trainer:
    """A run from its newest checkpoint to its last step.

    Args:
        config: of the run.
        trainee: on the accelerator's device.
        source: of the batches.
        split: the rows.
        folder: where checkpoints go.
        accelerator: of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainee: Trainee,
        source: Source,
        split: Split,
        folder: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.trainee, self.source, self.split = config, trainee, source, split
        self.folder, self.accelerator = folder, accelerator
        self.plan = StepPlan(
            [len(row.tokens) for row in split.training],
            config.batch_size,
            config.gradient_accumulation * accelerator.num_processes,
            config.seed,
        )
        epochs = config.num_epochs or 1
        self.num_steps = config.max_steps or epochs * self.plan.steps_per_epoch
        model = WithLoss(trainee)
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
        self._resume()
        is_writer = accelerator.is_main_process
        self.log = TrainLog(folder.folder / "log.jsonl", self.progress.step, is_writer)

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
        # Processes work in step: one that has no batch left repeats the first, for nothing.
        turns = range(rank, -(-len(batches) // world) * world, world)
        sums: dict[str, Tensor] = {}
        for turn in turns:
            is_real = turn < len(batches)
            place = turn if is_real else 0
            weight = counts[place] / sum(counts) if is_real else 0.0
            # Processes exchange gradients once a step, with their last batch.
            gradients = nullcontext() if turn == turns[-1] else accelerator.no_sync(self.model)
            with gradients, seeded(accelerator.device, self.config.seed, index, place):
                parts = self._backward(batches[place], weight)
            sums = {name: sums.get(name, 0) + part for name, part in parts.items()}
        return self._reduced(sums)

    def _backward(self, rows: list[AnswerRow], weight: float) -> dict[str, Tensor]:
        """Add a batch's share of the step's gradients; its share of the losses.

        Args:
            rows: of the batch.
            weight: its share of the step's answer tokens. Processes' gradients are averaged, so
                each one counts as many times as there are processes.
        """
        loss, parts = self.model(self.source.batch(rows, self._lay))
        self.accelerator.backward(loss * weight * self.accelerator.num_processes)
        return {name: part * weight for name, part in {"loss": loss.detach(), **parts}.items()}

    def _lay(self, lengths: Sequence[int]) -> Layout:
        line_len = self.config.data.pack_len
        return padded(lengths) if line_len is None else packed(lengths, line_len)

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
        config = self.config
        return evaluate(
            self.trainee,
            self.source,
            self.split.validation,
            batch_size=config.batch_size,
            depth=config.eval_depth,
            seed=config.seed,
            accelerator=self.accelerator,
        )

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            states = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                states["scaler"] = self.accelerator.scaler.state_dict()
            tensors = {name: each.detach().cpu() for name, each in self._tensors().items()}
            self.folder.save(self.progress, tensors, states)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes."""
        weights = self.trainee.module.named_parameters()
        return {name: weight for name, weight in weights if weight.requires_grad}

    def _resume(self) -> None:
        saved = self.folder.load()
        if saved is None:
            return
        self.progress = saved.progress
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(saved.tensors[name])
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
