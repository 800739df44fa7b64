"""What a training run is, as strict dataclasses behind YAML and `key=value` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.common.config import load_strict, require_at_least, require_at_most
from specdec.registry import head_kinds, trainable_kinds

PRECISIONS = ("no", "bf16", "fp16")
SHARDINGS = ("none", "fsdp2")
TRACKERS = ("none", "tensorboard")


@dataclass
class TargetConfig:
    """The model whose answers are learned; see `load_target`.

    `device` is "cpu", "cuda" or None; which GPU, and how many, is the launcher's business.
    """

    path: str = "demo"
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None


@dataclass
class DrafterConfig:
    """What is trained: a kind, and the options of a new drafter of that kind.

    For heads these are the options of `specdec.drafters.{kind}.build`, for "draft_model" those of
    `DraftModelOptions`. `init` names a head to go on from instead of a new one.
    """

    kind: str = ""
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"rule": "a mapping of the drafter's options"}
    )
    init: str | None = None


@dataclass
class DataConfig:
    """What the target answered: a folder of `specdec regenerate`, or a JSONL file of rows.

    A folder has its own held-out rows, of which `num_validation` takes the first ones; of a file
    the last `num_validation` rows, or `validation_fraction` of it, are held out. Longer rows are
    cut to `max_len` tokens; None: the target's context. `max_rows` takes the first training rows
    only. `pack_len` puts several rows into lines of so many tokens.
    """

    path: str = ""
    num_validation: int | None = None
    validation_fraction: float | None = None
    max_len: int | None = None
    max_rows: int | None = None
    pack_len: int | None = None


@dataclass
class ParityConfig:
    """The gate at the end: the loop must accept what offline acceptance predicts.

    The trained drafter drafts greedy chains for `num_prompts` held-out prompts, `max_new_tokens`
    each; 0 prompts: no gate. `max_difference` is relative.
    """

    num_prompts: int = 32
    max_new_tokens: int = 64
    batch_size: int = 8
    max_difference: float = 0.05


@dataclass
class TrainConfig:
    """A whole run. Of `num_epochs` and `max_steps` one is given, and neither means one epoch.

    A step takes `batch_size` rows times `gradient_accumulation` times the number of processes.
    `eval_every` and `save_every` count steps; 0 means at the end only. `mixed_precision` None
    follows the target's dtype. `sharding` says how several processes hold what is trained: "none"
    whole in each, "fsdp2" shared out among them; one process alone holds all of it either way.
    """

    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = field(
        default_factory=dict, metadata={"rule": "a mapping of the loss's options"}
    )
    draft_vocab_size: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    num_epochs: int | None = None
    max_steps: int | None = None
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    seed: int = 0
    threads: int = 2
    save_every: int = 500
    eval_every: int = 500
    eval_depth: int = 5
    log_with: str = "none"
    mixed_precision: str | None = None
    sharding: str = "none"
    parity: ParityConfig = field(default_factory=ParityConfig)


def load_train_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read YAML and overrides.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that does not exist (with the nearest one), or a value of a wrong type or
            outside its range.
    """
    config = load_strict(TrainConfig, path, Path(path), overrides, example="lr=1e-3")
    _check_choices(config)
    _check_sizes(config)
    return config


def _check_choices(config: TrainConfig) -> None:
    _require_one_of("drafter.kind", config.drafter.kind, trainable_kinds())
    _require_one_of("log_with", config.log_with, TRACKERS)
    _require_one_of("sharding", config.sharding, SHARDINGS)
    if config.mixed_precision is not None:
        _require_one_of("mixed_precision", config.mixed_precision, PRECISIONS)
    if config.target.device is not None:
        _require_one_of("target.device", config.target.device, ("cpu", "cuda"))
    if not config.data.path:
        raise ValueError(
            "config data.path is empty but must name answers: a folder that "
            "specdec regenerate wrote, or a JSONL file"
        )
    if config.num_epochs is not None and config.max_steps is not None:
        raise ValueError("config num_epochs and max_steps are both given; remove one")
    if config.data.pack_len is not None and config.drafter.kind in head_kinds():
        raise ValueError(
            f"config data.pack_len is for draft models; {config.drafter.kind} heads look ahead in "
            "their text, which packing would lead into the next one; remove it"
        )
    if config.drafter.init is not None and config.drafter.kind not in head_kinds():
        raise ValueError(
            "config drafter.init is for heads; a draft model starts from drafter.options.path"
        )
    if config.data.num_validation is not None and config.data.validation_fraction is not None:
        raise ValueError(
            "config data.num_validation and data.validation_fraction are both given; remove one"
        )


def _require_one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"config {key} is {value!r} but must be one of {', '.join(choices)}")


def _check_sizes(config: TrainConfig) -> None:
    counts = ("batch_size", "gradient_accumulation", "num_epochs", "max_steps", "threads")
    require_at_least(config, 1, *counts, "eval_depth", "draft_vocab_size")
    require_at_most(config, 4096, "threads")
    require_at_least(config, 0, "warmup_steps", "weight_decay", "save_every", "eval_every", "seed")
    require_at_least(config.data, 1, "num_validation", "max_rows", prefix="data.")
    # Shorter texts hold no token behind a first answer token and its prompt.
    require_at_least(config.data, 3, "max_len", prefix="data.")
    for name in ("lr", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(f"config {name} is {getattr(config, name)} but must be above 0")
    require_at_least(config.data, 3, "pack_len", prefix="data.")
    require_at_least(config.parity, 0, "num_prompts", prefix="parity.")
    require_at_least(config.parity, 2, "max_new_tokens", prefix="parity.")
    require_at_least(config.parity, 1, "batch_size", prefix="parity.")
    if not config.parity.max_difference > 0:
        raise ValueError(
            f"config parity.max_difference is {config.parity.max_difference} but must be above 0; "
            "parity.num_prompts=0 turns the gate off"
        )
    share = config.data.validation_fraction
    if share is not None and not 0 < share < 1:
        raise ValueError(f"config data.validation_fraction is {share} but must be within (0, 1)")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"config betas is {config.betas} but must be two numbers in [0, 1)")
