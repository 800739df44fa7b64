"""Training on transformers' `Trainer`: our batches, losses, evaluation and checkpoints in its loop.

Rows and noise of a step are functions of the seed and the step, so that a resumed run has no
random state to restore, and several processes do what one does with more accumulated batches.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from specdec.common.files import LineFile, replace_file
from specdec.data.answers import AnswerRow
from specdec.targets.load import find_device
from specdec.train.acceptance import evaluate
from specdec.train.checkpoint import (
    Progress,
    newest_checkpoint,
    read_tensors,
    unsharded,
    whole,
    write_checkpoint,
)
from specdec.train.config import TrainConfig
from specdec.train.data import Source, Split, StepBatch, StepPlan, seeded
from specdec.train.trainees import Trainee

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped at a checkpoint; its process exits with `status`."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name} at {checkpoint}; the same command resumes from there")
        self.status = 128 + number


@contextmanager
def noted_signals() -> Iterator[dict[int, float]]:
    """Note SIGTERM and Ctrl-C, and when they came; a second Ctrl-C is a `KeyboardInterrupt`.

    Signal handlers belong to the main thread; in others nothing is noted.
    """
    received: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = received.setdefault(number, now)
        # A launcher passes on the Ctrl-C that the terminal has sent its processes already.
        if number == signal.SIGINT and now - first > 1:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, note) for number in _SIGNALS} if is_main else {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer(transformers.Trainer, TrainerCallback):
    """A run from its newest checkpoint to its last step, which calls itself back at every step."""

    model: Trainee
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        config: TrainConfig,
        trainee: Trainee,
        source: Source,
        split: Split,
        arguments: TrainingArguments,
        identity: dict[str, Any],
        show: Callable[[int, int, str], None],
    ) -> None:
        if not split.validation:
            arguments.eval_strategy = IntervalStrategy.NO
        for name, weight in trainee.module.named_parameters() if arguments.fsdp else ():
            if not weight.is_floating_point():
                raise ValueError(
                    f"config training.fsdp is true, but {name!r} is quantized ({weight.dtype}) and "
                    "cannot be sharded; set training.fsdp=false or drafter.options.method=lora"
                )
        self.config, self.source, self.split = config, source, split
        self.out, self.identity, self.show = Path(str(arguments.output_dir)), identity, show
        self.plan = StepPlan(
            split.training,
            config.training.per_device_train_batch_size,
            config.training.gradient_accumulation_steps * arguments.world_size,
            config.training.seed,
            arguments.process_index,
            arguments.world_size,
        )
        self.step_seconds = 0.0  # of all sessions
        self._received: dict[int, float] = {}  # signals of this process
        self._heard: list[int] = []  # signals that any process received, as all know
        self._sums: dict[str, Tensor] = {}  # losses of this process in the running step
        self._unlogged: list[tuple[dict[str, float], int, float]] = []  # losses, tokens, seconds
        self._log: LineFile | None = None
        super().__init__(
            model=trainee,
            args=arguments,
            train_dataset=self.plan,
            eval_dataset=split.validation,
            callbacks=[self],
        )
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.out / "tensorboard")

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs too, where accelerate ignores FSDP without a word."""
        arguments = self.args
        if arguments.fsdp:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision)
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if arguments.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def run(self) -> None:
        found = self._resumed = newest_checkpoint(self.out, self.identity)
        steps = gather_object([found.state.global_step if found else 0])
        if len({*steps}) > 1:
            raise ValueError(
                f"the processes find checkpoints of different steps {steps} in {str(self.out)!r}; "
                "put --out where all machines see the same folder"
            )
        self._began = time.monotonic()
        if found is not None:
            self._began -= found.progress.seconds
            self.step_seconds = found.progress.step_seconds
        try:
            if found is not None and found.state.global_step == found.state.max_steps:
                read_tensors(found.folder, self._tensors()[0], "weight.")
                self.state = found.state
            else:
                with noted_signals() as self._received:
                    self.train(resume_from_checkpoint=str(found.folder) if found else None)
            if (number := self._signal()) is not None:
                raise Interrupted(number, self._checkpoint())
            if self.split.validation and not self._is_evaluated():
                self.evaluate()
        finally:
            self.seconds = time.monotonic() - self._began
            if self._log:
                self._log.close()

    # --- Steps ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.plan, batch_size=None, collate_fn=lambda batch: {"batch": batch})

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.state.compute_steps(self.args, self.state.max_steps)  # not those of earlier sessions
        step, strategy = self.state.global_step, self.args.eval_strategy
        # A run that was stopped has left its evaluation to this session.
        is_due = strategy == IntervalStrategy.STEPS and step % self.state.eval_steps == 0
        is_new = strategy != IntervalStrategy.NO and step == 0  # what it is like untrained
        self.args.eval_on_start = (is_due or is_new) and not self._is_evaluated()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.plan.epoch = self.state.global_step // self.plan.steps_per_epoch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_began = time.monotonic()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add a batch's share of a step's gradients; all its answer tokens weigh the same."""
        batch: StepBatch = inputs["batch"]
        model.train()
        seen = self.source.batch(batch.rows, self.config.data.pack_len)
        seed = (self.config.training.seed, batch.step, batch.place)
        with seeded(self.args.device, *seed), self.accelerator.autocast():
            loss, parts = model(seen)
        # Gradients are averaged over processes, and are to be added.
        self.accelerator.backward(loss * batch.weight * self.accelerator.num_processes)
        for name, part in {"loss": loss.detach(), **parts}.items():
            self._sums[name] = self._sums.get(name, 0) + part.float() * batch.weight
        return loss.detach() * batch.weight

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Refuse what is not finite before a step is taken with it."""
        norm = float(whole(super()._get_grad_norm(model, grad_norm=grad_norm)))
        # Processes learn of each other's signals with their losses.
        received = [float(number in self._received) for number in _SIGNALS]
        mine = [*self._sums.values(), *torch.tensor(received, device=self.args.device)]
        values = self.accelerator.reduce(torch.stack(mine), "sum").tolist()
        self._losses = dict(zip(self._sums, values, strict=False))  # of all processes
        self._heard = [n for n, count in zip(_SIGNALS, values[-2:], strict=True) if count]
        self._sums = {}
        # Under float16 the loss scaler skips a step whose scaled gradients overflow.
        is_scaled = self.accelerator.scaler is not None
        if not math.isfinite(self._losses["loss"]) or not (is_scaled or math.isfinite(norm)):
            raise self._not_finite(norm)
        return norm

    def _not_finite(self, norm: float) -> FloatingPointError:
        """Make the error that stops the run; all processes call together."""
        step, loss = self.state.global_step, self._losses["loss"]
        rows, culprits = self.plan.rows(step), []
        with torch.no_grad(), unsharded(self.model), self.accelerator.autocast():
            for row in rows:
                with seeded(self.args.device, self.config.training.seed, step):
                    its, _ = self.model(self.source.batch([row]))
                culprits += [] if its.isfinite() else [row]
        where = f"it read {_named(rows)}"
        if culprits:
            where = f"the loss of {_named(culprits)} alone is not finite, look at it first"
        return FloatingPointError(
            f"step {step + 1}: the loss is {loss} and its gradients' norm {norm}; both must be "
            f"finite. In this step {where}. The checkpoints in {str(self.out)!r} are intact; lower "
            "training.learning_rate or max_grad_norm, or use float32, with another --out folder"
        )

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds, state = time.monotonic() - self._step_began, self.state
        tokens = sum(len(row.tokens) for row in self.plan.rows(state.global_step - 1))
        self._unlogged.append((self._losses, tokens, seconds))
        self.step_seconds += seconds
        is_stopped = self._signal() is not None
        if is_stopped or state.global_step >= state.max_steps:
            control = self.control
            control.should_log = control.should_save = control.should_training_stop = True
            # A run that is stopped leaves its evaluation to the next session.
            control.should_evaluate = bool(self.split.validation) and not is_stopped
        if state.is_world_process_zero:
            evaluation = self.last("evaluation")
            tau = f", offline tau {evaluation['tau']:.2f}" if evaluation else ""
            text = f"loss {self._losses['loss']:.3f}, {tokens / seconds:.0f} tokens/s{tau}"
            self.show(state.global_step, state.max_steps, text)

    def _signal(self) -> int | None:
        """Return the signal that stops the run; several processes must all have heard of it."""
        heard = self._received if self.accelerator.num_processes == 1 else self._heard
        return min(heard, default=None)

    # --- Measurements ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        held_out = self.split.validation
        with unsharded(self.model):
            measured = evaluate(self.model, self.source, held_out, self.config, self.accelerator)
        alpha = {f"eval_alpha_{t}": value for t, value in (measured.alpha or {}).items()}
        metrics = {"eval_loss": measured.validation_loss, "eval_tau": measured.tau, **alpha}
        self._record("evaluation", measured.model_dump(mode="json"), metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record the steps since the last record."""
        if not self._unlogged:
            return
        losses, tokens, seconds = zip(*self._unlogged, strict=True)
        self._unlogged = []
        norm = logs["grad_norm"]
        values = {
            **{name: sum(each[name] for each in losses) / len(losses) for name in losses[0]},
            "learning_rate": logs["learning_rate"],
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_s": sum(tokens) / sum(seconds),
        }
        self._record("step", values, {n: v for n, v in values.items() if v is not None})

    def _record(self, kind: str, values: dict[str, Any], figures: dict[str, float]) -> None:
        """Add a line to the log, and numbers to the trackers.

        A session begins `log.jsonl` with what the state remembers; later lines are dropped.
        """
        lines = [{"kind": kind, "step": self.state.global_step, **values}]
        self.state.log_history += lines
        if self.is_world_process_zero():
            if self._log is None:
                replace_file(self.out / "log.jsonl", b"")
                self._log, lines = LineFile(self.out / "log.jsonl"), self.state.log_history
            self._log.append(*lines)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, figures)

    def last(self, kind: str, at: int | None = None) -> dict[str, Any]:
        """Return the newest record of a kind, or that of a step."""
        known = (r for r in reversed(self.state.log_history) if r["kind"] == kind)
        return next((r for r in known if at is None or r["step"] == at), {})

    def _is_evaluated(self) -> bool:
        return self.last("evaluation").get("step") == self.state.global_step

    # --- Checkpoints ---

    def _checkpoint(self) -> Path:
        return self.out / f"checkpoint-{self.state.global_step}"

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what training changes, in place: weights and, after a first step, the optimizer.

        The second part is what the optimizer holds as plain numbers.
        """
        tensors, numbers = dict[str, Tensor](), dict[str, float]()
        state = self.optimizer.state if self.optimizer else {}
        for name, weight in self.model.trained.items():
            tensors[f"weight.{name}"] = weight.detach()
            for key, value in state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                elif value is not None:
                    numbers[f"optimizer.{name}.{key}"] = value
        return tensors, numbers

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        tensors, numbers = self._tensors()
        scaler = self.accelerator.scaler
        progress = Progress(
            identity=self.identity,
            seconds=time.monotonic() - self._began,
            step_seconds=self.step_seconds,
            scheduler=self.lr_scheduler.state_dict(),
            scaler=scaler.state_dict() if scaler else {},
            numbers=numbers,
        )
        write_checkpoint(self._checkpoint(), progress, self.state, tensors)
        if self.is_world_process_zero():
            rotate_checkpoints(str(self.out), self.args.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Leave the weights to what comes next: they are where they stay only then."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        progress, optimizer = self._resumed.progress, self.optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()  # by nothing: the optimizer knows best which tensors it keeps
        optimizer.zero_grad()
        read_tensors(self._resumed.folder, self._tensors()[0])
        weights = self.model.trained
        for full, number in progress.numbers.items():
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            optimizer.state[weights[name]][key] = number
        self.lr_scheduler.load_state_dict(progress.scheduler)
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and progress.scaler:
            self.accelerator.scaler.load_state_dict(progress.scaler)


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """Make transformers' arguments of a run, whose processes join here."""
    given = {"num_train_epochs": 1, **config.training.model_dump(exclude_none=True)}
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=find_device(config.target.device).type == "cpu",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        **given,
    )
    # Without a launcher a run is one process on one GPU, and not `DataParallel` on all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.world_size == 1:
        arguments.fsdp = arguments.fsdp_plugin_args = None
    return arguments


def follow_dtype(arguments: TrainingArguments, dtype: torch.dtype, config: TrainConfig) -> None:
    """Train in the mixed precision that the target's dtype asks for, where none is chosen."""
    follows = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if follows is None or config.training.bf16 or config.training.fp16:
        return
    if getattr(config.training, follows) is False:
        raise ValueError(
            f"config training.{follows} is false but the target is in {dtype}, and heads use its "
            f"embedding and projection; set training.{follows}=true or target.dtype=float32"
        )
    setattr(arguments, follows, True)
    arguments.mixed_precision = follows


def _named(rows: Sequence[AnswerRow]) -> str:
    names = ", ".join(repr(row.id) for row in rows[:5])
    return f"row{'s'[: len(rows) - 1]} {names}" + ("" if len(rows) <= 5 else " and others")
