"""The training loop of drafters: one process or several, killed and resumed at will."""

import math
import time
from collections.abc import Callable, Sequence
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
from specdec.train.interruption import Interrupted, Interruption, signal_of
from specdec.train.learner import Learner
from specdec.train.log import TrainLog
from specdec.train.not_finite import not_finite, rows_without_loss
from specdec.train.objective import seeded
from specdec.train.schedule import learning_rate
from specdec.train.source import Source
from specdec.train.state import Progress, RunFolder
from specdec.train.tensor_files import read_tensors
from specdec.train.trainee import Trainee

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

    Raises:
        ValueError: weights that cannot be sharded; a checkpoint of another run or a damaged one;
            processes that do not see the same folder.
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
        self.learner = Learner(trainee, config, accelerator)
        self.progress = Progress()
        self._resume()
        is_writer = accelerator.is_main_process
        self.log = TrainLog(folder.folder / "log.jsonl", self.progress.step, is_writer)
        self._interruption = Interruption()
        self._shared_counts = self._interruption.counts  # over all processes

    def run(self, callback: Callback) -> None:
        """Train to the last step, evaluating and saving on the way and at the end.

        Args:
            callback: given steps done, steps in all, and what was measured.

        Raises:
            FloatingPointError: the loss or its gradients are not finite; checkpoints are kept.
            Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
            OSError: a checkpoint could not be written.
        """
        if self.config.log_with != "none":
            purge = {"purge_step": self.progress.step + 1}
            tracker = self.config.log_with
            self.accelerator.init_trackers(tracker, init_kwargs={tracker: purge})
        try:
            with self._interruption:
                self._run(callback)
        finally:
            self.log.close()
            # Not `end_training`: weights are still to be gathered from all processes.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _run(self, callback: Callback) -> None:
        before, started = self.progress.seconds, time.monotonic()
        if self._owes_evaluation():
            self._evaluate()
        while self.progress.step < self.num_steps:
            self._log(self._step())
            if self._signal() is None and self._owes_evaluation():
                self._evaluate()
            self.progress.seconds = before + time.monotonic() - started
            signal = self._signal()
            if signal is not None or self._is_due(self.config.save_every):
                self._save()
            callback(self.progress.step, self.num_steps, self._summary())
            if signal is not None:
                raise Interrupted(signal, self.folder.path(self.progress.step))

    def _signal(self) -> int | None:
        """The signal that stops the run; several processes must all have heard of it."""
        is_alone = self.accelerator.num_processes == 1
        return signal_of(self._interruption.counts if is_alone else self._shared_counts)

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.num_steps or (every > 0 and step % every == 0)

    def _owes_evaluation(self) -> bool:
        """A run that was stopped leaves its evaluation to the next session."""
        step, newest = self.progress.step, self.log.last("evaluation")
        is_done = newest is not None and newest["step"] == step
        is_wanted = bool(self.split.validation) and step > 0 and not is_done
        return is_wanted and self._is_due(self.config.eval_every)

    def _step(self) -> dict[str, Any]:
        """One optimizer step; its line of the log."""
        started, config = time.monotonic(), self.config
        index = self.progress.step
        batches = [[self.split.training[n] for n in b] for b in self.plan.batches(index)]
        rows = [row for batch in batches for row in batch]
        losses = self._accumulate(index, batches)
        norm = self.learner.clip(config.max_grad_norm)
        self._require_finite(losses["loss"], norm, rows)
        rate = learning_rate(index, config.lr, config.warmup_steps, self.num_steps)
        self.learner.step(rate)
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
            batch = self.source.batch(batches[place], self._lay)
            with seeded(accelerator.device, self.config.seed, index, place):
                parts = self.learner.backward(batch, weight, is_last=turn == turns[-1])
            sums = {name: sums.get(name, 0) + part for name, part in parts.items()}
        return self._reduced(sums)

    def _lay(self, lengths: Sequence[int]) -> Layout:
        line_len = self.config.data.pack_len
        return padded(lengths) if line_len is None else packed(lengths, line_len)

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over all processes, which learn of each other's signals with them."""
        counts = torch.tensor(self._interruption.counts, device=self.accelerator.device)
        stacked = torch.cat([torch.stack([each.float() for each in sums.values()]), counts])
        values = self.accelerator.reduce(stacked, "sum").tolist()
        self._shared_counts = values[len(sums) :]
        return dict(zip(sums, values, strict=False))

    def _require_finite(self, loss: float, norm: float, rows: Sequence[AnswerRow]) -> None:
        # Under float16 the loss scaler skips a step whose scaled gradients overflow.
        is_scaled = self.accelerator.scaler is not None
        if math.isfinite(loss) and (is_scaled or math.isfinite(norm)):
            return
        index, culprits = self.progress.step, []
        if not math.isfinite(loss):
            seed = (self.config.seed, index)
            culprits = rows_without_loss(self.learner, self.source, rows, self.accelerator, seed)
        raise not_finite(index + 1, loss, norm, rows, culprits, self.folder.folder)

    def _evaluate(self) -> None:
        config = self.config
        with self.learner.unsharded():
            measured = evaluate(
                self.learner.model,
                self.source,
                self.split.validation,
                batch_size=config.batch_size,
                depth=config.eval_depth,
                seed=config.seed,
                accelerator=self.accelerator,
            )
        self._log({"kind": "evaluation", "step": self.progress.step} | measured)

    def _save(self) -> None:
        self.folder.save(self.progress, self.learner.tensors(), self.learner.scaler)

    def _resume(self) -> None:
        saved = self.folder.newest()
        step = torch.tensor(0 if saved is None else saved.progress.step)
        steps = self.accelerator.gather(step.view(1).to(self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes find checkpoints of different steps {sorted(set(steps))} in "
                f"{str(self.folder.folder)!r}; put --out where all machines see the same folder"
            )
        if saved is None:
            return
        read_tensors(saved.folder, self.learner.empty_tensors())
        self.progress, self.learner.scaler = saved.progress, saved.scaler

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
