"""The training loop of drafters: one process or several, killed and resumed at will."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.common.files import append, close_durably, parse_line, replace_file
from specdec.data.answers import AnswerRow
from specdec.drafters.training import TrainingBatch
from specdec.train.checkpoint import (
    Progress,
    RunFolder,
    read_tensors,
    set_gradient_sync,
    shard,
    unsharded,
    whole,
    whole_state,
)
from specdec.train.config import TrainConfig
from specdec.train.data import (
    Layout,
    Source,
    Split,
    StepPlan,
    packed,
    padded,
    parameter_groups,
    seeded,
)
from specdec.train.evaluate import evaluate
from specdec.train.heads import Trainee, WithLoss

# A launcher passes on to its processes the Ctrl-C that the terminal has sent them already.
_SAME_PRESS_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped at a checkpoint.

    Attributes:
        status: exit status of the process, 128 and the signal's number.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name} at {checkpoint}; the same command resumes from there")
        self.status = 128 + number


class Interruption:
    """Notes SIGTERM and Ctrl-C while it is entered; a second Ctrl-C is a `KeyboardInterrupt`.

    Signal handlers belong to the main thread; in others nothing is noted.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}  # number -> when
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def counts(self) -> list[float]:
        """Of Ctrl-C and SIGTERM, 1 for each that came to this process; processes are summed."""
        return [float(n in self._received) for n in (signal.SIGINT, signal.SIGTERM)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._received.setdefault(number, now)
        if number == signal.SIGINT and now - first > _SAME_PRESS_S:
            raise KeyboardInterrupt


def signal_of(counts: list[float]) -> int | None:
    """The signal that stops a run, of `Interruption.counts` or their sum over processes."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    return next((number for number, count in zip(numbers, counts, strict=True) if count), None)


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
        """Hold all weights in this process; see `specdec.train.checkpoint.unsharded`."""
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


class TrainLog:
    """The log of a run. Lines behind the step that a run resumes from are dropped.

    Args:
        path: of the file; made if it is not there.
        step: that the run resumes from, 0 for a new one.
        is_writer: only one process of several writes; the others keep their records in memory.
    """

    def __init__(self, path: Path, step: int, is_writer: bool = True) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = map(parse_line, lines)
        self.records = [record for record in found if 0 < record.get("step", 0) <= step]
        self._file, self._folder = None, path.parent
        if is_writer:
            kept = "".join(json.dumps(record) + "\n" for record in self.records)
            replace_file(path, kept.encode())
            self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which has "kind" and "step"; it outlives the process at once.

        Raises:
            OSError: it could not be written, in words.
        """
        self.records.append(record)
        if self._file:
            append(self._file, json.dumps(record) + "\n", self._folder)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest record of a kind."""
        return next((each for each in reversed(self.records) if each["kind"] == kind), None)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            close_durably(self._file)


_NAMED_ROWS = 5


def rows_without_loss(
    learner: Learner,
    source: Source,
    rows: Sequence[AnswerRow],
    accelerator: Accelerator,
    seed: Sequence[int],
) -> list[AnswerRow]:
    """The rows whose loss is not finite when each is read alone.

    Every process reads all of them, so that all find the same ones.

    Args:
        learner: all processes call together.
        source: of the batches.
        rows: of one step.
        accelerator: of this process.
        seed: of the noise.
    """
    found = []
    with torch.no_grad(), learner.unsharded():
        for row in rows:
            with seeded(accelerator.device, *seed), accelerator.autocast():
                loss, _ = learner.model(source.batch([row]))
            if not loss.isfinite():
                found.append(row)
    return found


def not_finite(
    step: int,
    loss: float,
    norm: float,
    rows: Sequence[AnswerRow],
    culprits: Sequence[AnswerRow],
    folder: Path,
) -> FloatingPointError:
    """What stops the run.

    Args:
        step: counted from 1.
        loss: of the step.
        norm: of its gradients.
        rows: of the step.
        culprits: those whose own loss is not finite.
        folder: of the run.
    """
    if culprits:
        where = f"the loss of {_named(culprits)} alone is not finite, look at it first"
    elif not math.isfinite(loss):
        where = f"none of its rows alone has such a loss; it read {_named(rows)}"
    else:
        where = f"it read {_named(rows)}"
    return FloatingPointError(
        f"step {step}: the loss is {loss} and its gradients' norm {norm}; both must be finite. "
        f"In this step {where}. The newest checkpoint in {str(folder)!r} is intact; lower lr or "
        "max_grad_norm, or train in float32, into another --out folder"
    )


def _named(rows: Sequence[AnswerRow]) -> str:
    names = ", ".join(repr(row.id) for row in rows[:_NAMED_ROWS])
    more = len(rows) - _NAMED_ROWS
    plural = "s" if len(rows) > 1 else ""
    return f"row{plural} {names}" + (f" and {more} more" if more > 0 else "")


def learning_rate(step: int, peak: float, num_warmup: int, num_steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to 0 behind the last step.

    Args:
        step: counted from 0.
        peak: reached by step `num_warmup - 1`, or at once without warm-up.
        num_warmup: steps of warm-up.
        num_steps: of the whole run.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


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
