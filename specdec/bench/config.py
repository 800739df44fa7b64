"""What a bench runs, as strict dataclasses behind YAML and `key=value` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.bench.arm_grid import expand_arms
from specdec.bench.draft_length import check_draft_length
from specdec.demo import demo_path
from specdec.sampling_config import SamplingConfig
from specdec.strict_config import build_strict, read_yaml, require_at_least, require_at_most

SINGLE_PROMPT_TYPES = ("hf_assisted", "hf_prompt_lookup")


@dataclass
class TargetConfig:
    """The model whose distribution is kept; see `load_target`."""

    path: str = "demo"
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None


@dataclass
class PromptConfig:
    """Which prompts: a source by name (see `bench/prompts.py`) or a file."""

    source: str = "demo"
    num: int = 40
    data_dir: str | None = None
    seed: int = 0


@dataclass
class ArmConfig:
    """One strategy: a registered drafter, "hf_assisted" or "hf_prompt_lookup"; with options.

    `draft_length` limits the nodes that a row may draft, by the size of the running batch:
    `{1: 6, 8: 0}`, or `{plan: PATH}` for the controller of a plan.
    """

    name: str = ""
    type: str = ""
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"rule": "a mapping of an arm's options"}
    )
    draft_length: dict[Any, Any] | None = None


@dataclass
class SamplingOptions:
    """See `SamplingConfig`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0


@dataclass
class BenchConfig:
    """A whole run. "plain" and "hf_generate" are always measured beside the arms.

    Each arm is given `prompts_per_call` prompts at a time, 0 for one batch of them, and then it is
    the next arm's turn. With more than a batch, rows of our loop that finish make room for the
    next prompt; transformers decodes one batch after the other.
    """

    target: TargetConfig = field(default_factory=TargetConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    arms: list[ArmConfig] = field(
        default_factory=list, metadata={"rule": "a list, each like {type: ngram}"}
    )
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int = 64
    batch_size: int = 1
    prompts_per_call: int = 0
    repeats: int = 3
    seed: int = 0
    threads: int = 2
    rule: str = "token"

    @property
    def call_size(self) -> int:
        """Prompts that an arm is given at a time."""
        return self.prompts_per_call or self.batch_size


def load_config(path: str, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read YAML and overrides; "demo" is the packaged configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that does not exist (with the nearest one), a value of a wrong type, or
            a grid over more than the options of an arm.
    """
    given = read_config(path, overrides)
    if isinstance(given, dict) and "grid" in given:
        raise ValueError(
            f"config {path!r} holds a grid, but one configuration is wanted here: give a file "
            "without it; specdec bench runs grids"
        )
    return build_config(given)


def read_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The content of a bench's YAML with overrides; errors as in `load_config`."""
    file = demo_path("bench.yaml") if path == "demo" else Path(path)
    return read_yaml(path, file, overrides, example="repeats=1")


def build_config(given: Any) -> BenchConfig:
    """The configuration that `read_config` gave; errors as in `load_config`."""
    if isinstance(given, dict) and "arms" in given:
        given = {**given, "arms": expand_arms(given["arms"])}
    config = build_strict(BenchConfig, given)
    _check_values(config)
    return config


def _check_values(config: BenchConfig) -> None:
    require_at_least(config, 1, "max_new_tokens", "batch_size", "repeats", "threads")
    require_at_most(config, 4096, "repeats", "threads")
    if config.prompts_per_call and config.prompts_per_call < config.batch_size:
        raise ValueError(
            f"config prompts_per_call is {config.prompts_per_call} but must be 0 or at least "
            f"batch_size, {config.batch_size}"
        )
    require_at_least(config.prompts, 1, "num", prefix="prompts.")
    try:
        SamplingConfig(**vars(config.sampling))
    except ValueError as error:
        raise ValueError(f"config sampling.{error}") from error
    if config.sampling.min_new_tokens > config.max_new_tokens:
        raise ValueError(
            f"config sampling.min_new_tokens is {config.sampling.min_new_tokens} but must be at "
            f"most max_new_tokens, {config.max_new_tokens}"
        )
    _check_arms(config)


def _check_arms(config: BenchConfig) -> None:
    for arm in config.arms:
        arm.name = arm.name or arm.type
        arm.draft_length = check_draft_length(arm.name, arm.draft_length)
        if arm.type in SINGLE_PROMPT_TYPES and arm.draft_length:
            raise ValueError(
                f"config arms: {arm.name!r} is transformers' assisted generation, which takes no "
                "draft_length; drop it"
            )
        if arm.type in SINGLE_PROMPT_TYPES and config.batch_size > 1:
            raise ValueError(
                f"config arms: {arm.name!r} is transformers' assisted generation, which takes one "
                f"prompt at a time, but batch_size is {config.batch_size}; drop the arm or set "
                "batch_size=1"
            )
    names = ["plain", "hf_generate", *(arm.name for arm in config.arms)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"config arms: the name {min(twice)!r} is used twice; rename one arm")
