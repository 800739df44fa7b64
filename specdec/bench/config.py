"""What a bench runs, as strict dataclasses behind YAML and `key=value` overrides."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from specdec.demo import demo_path
from specdec.sampling_config import SamplingConfig

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
    """One strategy: a registered drafter, "hf_assisted" or "hf_prompt_lookup"; with options."""

    name: str = ""
    type: str = ""
    options: dict[str, Any] = field(default_factory=dict)


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
    arms: list[ArmConfig] = field(default_factory=list)
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
        ValueError: a key that does not exist (with the nearest one), or a value of a wrong type.
    """
    file = demo_path("bench.yaml") if path == "demo" else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config {path!r} is not a file; give a YAML file, or 'demo'")
    try:
        given = OmegaConf.load(file)
        for override in overrides:
            _override(given, override)
        _check_keys(OmegaConf.to_container(given), BenchConfig, "")
        merged = OmegaConf.merge(OmegaConf.structured(BenchConfig), given)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        key = getattr(error, "full_key", None)
        where = f"config {path!r}, {key}" if key else f"config {path!r}"
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, BenchConfig)
    _check_values(config)
    return config


def _override(given: Any, override: str) -> None:
    """Set one `key=value`; the key may go into a list by its index, as in `arms.0.name=x`."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must be key=value, for instance repeats=1")
    # OmegaConf's own parser, so that a value means what it means in the YAML file.
    parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
    try:
        OmegaConf.update(given, key, parsed, merge=True, force_add=True)
    except (TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"override {override!r} leads nowhere: {key!r} does not exist, or is of another kind"
        ) from error


def _check_keys(given: Any, schema: Any, prefix: str) -> None:
    if not isinstance(given, dict):
        where = f"key {prefix[:-1]}" if prefix else "file"
        raise ValueError(f"config {where} is {given!r} but must be a mapping of key: value")
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ";"
            raise ValueError(
                f"config key {prefix}{key} does not exist{hint} known: {', '.join(sorted(known))}"
            )
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _check_keys(value, factory, f"{prefix}{key}.")
        if key == "options":
            _require_kind(value, dict, f"{prefix}{key}", "a mapping of an arm's options")
        if key == "arms":
            _require_kind(value, list, key, "a list, each like {type: ngram}")
            for index, arm in enumerate(value):
                _check_keys(arm, ArmConfig, f"arms.{index}.")


def _require_kind(value: Any, kind: type, key: str, rule: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"config {key} is {value!r} but must be {rule}")


def _check_values(config: BenchConfig) -> None:
    for name in ("max_new_tokens", "batch_size", "repeats", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"config {name} is {getattr(config, name)} but must be at least 1")
    if config.prompts_per_call and config.prompts_per_call < config.batch_size:
        raise ValueError(
            f"config prompts_per_call is {config.prompts_per_call} but must be 0 or at least "
            f"batch_size, {config.batch_size}"
        )
    if config.prompts.num < 1:
        raise ValueError(f"config prompts.num is {config.prompts.num} but must be at least 1")
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
