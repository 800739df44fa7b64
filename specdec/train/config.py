"""Configuration of a training run: pydantic models behind YAML and `key=value` overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from specdec.common.arguments import nearest
from specdec.common.config import Config, HasOptions, load_config
from specdec.drafters.training import OBJECTIVES
from specdec.registry import DRAFTERS, strategy, trainable_kinds
from specdec.targets.options import Placement

Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Shorter texts hold no token behind a first answer token and its prompt.
TextLength = Annotated[int, Field(ge=3)]


class TargetConfig(Placement):
    """The model whose answers are learned; see `load_target`. The launcher chooses the GPU."""

    path: str = "demo"
    dtype: str | None = None
    device: Literal["cpu", "cuda"] | None = None


class DrafterConfig(HasOptions):
    """The drafter that is trained.

    Attributes:
        kind: a trainable strategy of `specdec.registry`, or `pkg.module:Class`.
        options: fields of a new head's `Options`, or of `DraftModelOptions`.
        init: folder or hub id of a head to go on from instead of a new one.
    """

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)
    init: str | None = None

    @field_validator("kind")
    @classmethod
    def _is_trainable(cls, kind: str, info: ValidationInfo) -> str:
        # JSON is the record of a run; what it names was checked then, and is not imported for it.
        if info.mode == "python" and not strategy(kind, typed=True).trained_as:
            raise ValueError(f"must be one of {', '.join(trainable_kinds())}, or pkg.module:Class")
        return kind

    @property
    def is_head(self) -> bool:
        return strategy(self.kind).trained_as == "head"


class DataConfig(Config):
    """Texts that the target wrote.

    Attributes:
        path: folder of `specdec regenerate` or `specdec features`, or a JSONL file of rows.
        num_validation: held-out rows; the first ones of a folder, the last ones of a file.
        validation_fraction: the same for a file, as a share of its rows.
        max_len: tokens that longer rows are cut to; None for the target's context.
        max_rows: training rows that are read, at most.
        pack_len: tokens of a line that several rows share; None for a line each.
    """

    path: Annotated[str, Field(min_length=1)]
    num_validation: Count | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_len: TextLength | None = None
    max_rows: Count | None = None
    pack_len: TextLength | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.num_validation and self.validation_fraction:
            raise ValueError(
                "data.num_validation and validation_fraction are both given; remove one"
            )
        return self


class ParityConfig(Config):
    """The gate at the end of a run; docs/training.md describes it.

    Attributes:
        num_prompts: held-out prompts that are decoded; 0 for no gate.
        max_new_tokens: length of each answer.
        batch_size: prompts decoded together.
        max_difference: relative difference of both taus that is let through.
    """

    num_prompts: Annotated[int, Field(ge=0)] = 32
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    batch_size: Count = 8
    max_difference: Annotated[float, Field(gt=0)] = 0.05


class TrainingConfig(Config):
    """Arguments of transformers' `TrainingArguments`, under their names, with our defaults.

    What is not here has no effect on drafters, or is set by other keys. One epoch is trained unless
    `num_train_epochs` or `max_steps` say otherwise. `bf16` and `fp16` follow the target's dtype
    where neither is given. Evaluation and checkpoint at the end are there with any strategy.
    """

    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count | None = None
    gradient_accumulation_steps: Count = 1
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Count | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: Annotated[float, Field(ge=0)] = 100
    optim: str | None = None
    optim_args: str | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    torch_empty_cache_steps: Count | None = None

    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: Annotated[float, Field(gt=0)] = 1
    report_to: str | list[str] = "none"
    run_name: str | None = None
    project: str | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    eval_steps: Annotated[float, Field(gt=0)] = 500
    eval_delay: Annotated[float, Field(ge=0)] = 0
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: Annotated[float, Field(gt=0)] = 500
    save_total_limit: Count = 2
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None

    fsdp: bool = False
    fsdp_config: dict[str, Any] | None = None
    ddp_backend: str | None = None
    ddp_timeout: Count | None = None
    ddp_bucket_cap_mb: Count | None = None
    ddp_find_unused_parameters: bool = False
    ddp_static_graph: bool | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.num_train_epochs and self.max_steps:
            raise ValueError("training.num_train_epochs and max_steps are both given; remove one")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("training.push_to_hub needs training.hub_model_id; give owner/name")
        return self


class TrainConfig(Config):
    """A whole run.

    Attributes:
        loss: options of the drafter's loss.
        draft_vocab_size: most frequent tokens of the answers, which are all that the head drafts.
        eval_depth: levels of the chains whose acceptance is measured.
        threads: torch threads on the CPU.
        training: see `TrainingConfig`.
    """

    target: TargetConfig = Field(default_factory=TargetConfig)
    drafter: DrafterConfig
    data: DataConfig
    loss: dict[str, Any] = Field(default_factory=dict)
    draft_vocab_size: Count | None = None
    eval_depth: Count = 5
    threads: Annotated[int, Field(ge=1, le=4096)] = 2
    parity: ParityConfig = Field(default_factory=ParityConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _fits_the_kind(self, info: ValidationInfo) -> Self:
        if info.mode == "json":
            return self
        name = str(self.loss.get("objective", "cross_entropy"))
        if self.drafter.kind in DRAFTERS and name not in OBJECTIVES:
            near = nearest(name, OBJECTIVES)
            hint = f"; did you mean {near}?" if near else ""
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"loss.objective is {name!r} but must be one of {known}{hint}")
        if self.drafter.is_head and self.data.pack_len is not None:
            raise ValueError(
                f"data.pack_len is for draft models; {self.drafter.kind} heads look ahead, into "
                "the text behind their own; remove it"
            )
        given = {"drafter.init": self.drafter.init, "draft_vocab_size": self.draft_vocab_size}
        for key, value in given.items():
            if value is not None and not self.drafter.is_head:
                raise ValueError(f"{key} is for heads; remove it")
        return self


def load_train_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    return load_config(TrainConfig, path, Path(path), overrides, "training.learning_rate=1e-3")
