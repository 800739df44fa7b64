"""Configurations of benches and suites, behind YAML files and `key=value` overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from specdec.bench.grid import expand_arms
from specdec.common.config import Config, read_yaml, validated
from specdec.demo import demo_path
from specdec.engine.draft_length import Schedule
from specdec.sampling.config import SamplingConfig
from specdec.verify import get_rule

Count = Annotated[int, Field(ge=1)]
Repeats = Annotated[int, Field(ge=1, le=4096)]
SuiteName = Literal["single_turn", "multi_turn", "long_context", "concurrent"]

SINGLE_PROMPT_TYPES = ("hf_assisted", "hf_prompt_lookup")


def refuse_twice(key: str, names: Sequence[Any]) -> None:
    """Refuse a name that stands twice in a list."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{key}: {twice[0]!r} is used twice; rename or drop one")


class TargetConfig(Config):
    """The model whose distribution is kept: arguments of `load_target`."""

    path: str = "demo"
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None


class PromptConfig(Config):
    """A named source of prompts (`bench/prompts.py`), a file or a folder of collected queries."""

    source: str = "demo"
    num: Count = 40
    data_dir: str | None = None
    seed: int = 0


class ArmConfig(Config):
    """One strategy: a registered drafter, "hf_assisted" or "hf_prompt_lookup"; with options.

    `draft_length` limits the nodes that a row may draft, by the size of the running batch:
    `{1: 6, 8: 0}`, or `{plan: PATH}` for the controller of a plan.
    """

    name: str = ""
    type: str
    options: dict[str, Any] = Field(default_factory=dict)
    draft_length: dict[Any, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ArmConfig":
        self.name = self.name or self.type
        option = self.draft_length
        if option is None or (set(option) == {"plan"} and isinstance(option["plan"], str)):
            return self
        # JSON keeps batch sizes under text keys.
        option = {int(k) if str(k).isdigit() else k: nodes for k, nodes in option.items()}
        try:
            Schedule(option)
        except ValueError as error:
            raise ValueError(
                f"arms: draft_length of {self.name!r}: {error}; it must map batch sizes to numbers "
                "of nodes, as in {1: 6, 8: 0}, or be {plan: PATH} of a plan.json"
            ) from error
        self.draft_length = dict(sorted(option.items()))
        return self


class SamplingOptions(Config):
    """Fields of `SamplingConfig` but its seed, which each request has of its own."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0

    @model_validator(mode="after")
    def _check(self) -> "SamplingOptions":
        try:
            self.with_seed(0)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error
        return self

    def with_seed(self, seed: int) -> SamplingConfig:
        """The settings of one request."""
        return SamplingConfig(**self.model_dump(), seed=seed)


class RunConfig(Config):
    """Keys that benches and suites share; baselines are always measured beside the arms."""

    baselines: ClassVar[tuple[str, ...]] = ("plain",)

    target: TargetConfig = Field(default_factory=TargetConfig)
    prompts: PromptConfig = Field(default_factory=PromptConfig)
    arms: list[ArmConfig] = Field(default_factory=list)
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    max_new_tokens: Count = 64
    repeats: Repeats = 3
    seed: int = 0
    threads: Repeats = 2
    rule: str = "token"

    @property
    def arm_names(self) -> list[str]:
        """Names of all arms, baselines first."""
        return [*self.baselines, *(arm.name for arm in self.arms)]

    @property
    def rows(self) -> int:
        """Requests that are decoded together, at most."""
        return int(getattr(self, "batch_size", getattr(self, "max_rows", 1)))

    @model_validator(mode="after")
    def _check_run(self) -> "RunConfig":
        get_rule(self.rule)
        refuse_twice("arms", self.arm_names)
        if self.sampling.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens is {self.sampling.min_new_tokens} but must be at most "
                f"max_new_tokens, {self.max_new_tokens}"
            )
        return self


class BenchConfig(RunConfig):
    """A bench: every arm decodes the same prompts, call by call.

    Each arm is given `prompts_per_call` prompts at a time, 0 for one batch of them, and then it is
    the next arm's turn. With more than a batch, rows of our loop that finish make room for the
    next prompt; transformers decodes one batch after the other.
    """

    baselines = ("plain", "hf_generate")

    batch_size: Count = 1
    prompts_per_call: int = 0

    @property
    def call_size(self) -> int:
        """Prompts that an arm is given at a time."""
        return self.prompts_per_call or self.batch_size

    @model_validator(mode="after")
    def _check_bench(self) -> "BenchConfig":
        if self.prompts_per_call and self.prompts_per_call < self.batch_size:
            raise ValueError(
                f"prompts_per_call is {self.prompts_per_call} but must be 0 or at least "
                f"batch_size, {self.batch_size}"
            )
        for arm in (arm for arm in self.arms if arm.type in SINGLE_PROMPT_TYPES):
            whose = f"arms: {arm.name!r} is transformers' assisted generation, which takes"
            if arm.draft_length:
                raise ValueError(f"{whose} no draft_length; drop it")
            if self.batch_size > 1:
                raise ValueError(
                    f"{whose} one prompt at a time, but batch_size is {self.batch_size}; drop the "
                    "arm or set batch_size=1"
                )
        return self


class SuiteConfig(RunConfig):
    """A suite: groups of requests; `prompts` is the pool of texts that they are made of."""

    suite: SuiteName
    prompts: PromptConfig = Field(default_factory=lambda: PromptConfig(num=80))
    max_new_tokens: Count = 48

    @model_validator(mode="after")
    def _check_arms(self) -> "SuiteConfig":
        for arm in self.arms:
            if arm.type in SINGLE_PROMPT_TYPES:
                raise ValueError(
                    f"arms: {arm.name!r} is transformers' assisted generation, but rows join and "
                    "leave a suite's batch, which only our own loop does; drop the arm, or compare "
                    "with it in a bench without suite"
                )
        return self


class LengthRange(Config):
    """Numbers of tokens from `low` to `high`, both included."""

    low: Count = 16
    high: Count = 256

    @model_validator(mode="after")
    def _check(self) -> "LengthRange":
        if self.high < self.low:
            raise ValueError(f"high is {self.high} but must be at least low, {self.low}")
        return self


class LengthBucket(LengthRange):
    """`num` prompts of `low` to `high` tokens."""

    name: str = ""
    low: Count = 1
    high: Count = 64
    num: Count = 6

    @model_validator(mode="after")
    def _fill_name(self) -> "LengthBucket":
        self.name = self.name or f"{self.low}-{self.high}"
        return self


def _usual_buckets() -> list[LengthBucket]:
    edges = {"short": (1, 48), "medium": (128, 256), "long": (512, 1024)}
    return [LengthBucket(name=name, low=low, high=high) for name, (low, high) in edges.items()]


class SingleTurnConfig(SuiteConfig):
    """Prompts of several lengths, one turn each."""

    suite: Literal["single_turn"] = "single_turn"
    buckets: Annotated[list[LengthBucket], Field(min_length=1)] = Field(
        default_factory=_usual_buckets
    )

    @model_validator(mode="after")
    def _check_names(self) -> "SingleTurnConfig":
        refuse_twice("buckets", [bucket.name for bucket in self.buckets])
        return self


class MultiTurnConfig(SuiteConfig):
    """Conversations of several turns, each asked after the target's own answers."""

    suite: Literal["multi_turn"] = "multi_turn"
    turns: Count = 10
    conversations: Count = 6


class LongContextConfig(SuiteConfig):
    """Conversations that fill the context up to one edge after the other.

    `context_len` is the last edge; None is the target's limit.
    """

    suite: Literal["long_context"] = "long_context"
    context_len: Count | None = None
    bins: Count = 8
    num: Count = 4


class ConcurrentConfig(SuiteConfig):
    """Users at the same time, each with requests of its own lengths.

    With `arrivals` "closed" a user's next request follows at once; with "poisson" each user sends
    `rate` requests a second on average, whether the one before is answered or not.
    `answer_len` bounds the new tokens of a request; `max_new_tokens` is not used.
    """

    suite: Literal["concurrent"] = "concurrent"
    users: Annotated[list[Count], Field(min_length=1)] = Field(
        default_factory=lambda: [1, 2, 4, 8, 16]
    )
    requests_per_user: Count = 3
    prompt_len: LengthRange = Field(default_factory=LengthRange)
    answer_len: LengthRange = Field(default_factory=lambda: LengthRange(low=16, high=96))
    arrivals: Literal["closed", "poisson"] = "closed"
    rate: Annotated[float, Field(gt=0)] = 1.0
    max_rows: Count = 16
    max_cache_bytes: Count | None = None

    @model_validator(mode="after")
    def _check_users(self) -> "ConcurrentConfig":
        refuse_twice("users", self.users)
        return self


AnySuite = Annotated[
    SingleTurnConfig | MultiTurnConfig | LongContextConfig | ConcurrentConfig,
    Field(discriminator="suite"),
]
SUITES: dict[str, type[SuiteConfig]] = {
    "single_turn": SingleTurnConfig,
    "multi_turn": MultiTurnConfig,
    "long_context": LongContextConfig,
    "concurrent": ConcurrentConfig,
}


def load_config(path: str, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read the YAML of one bench and overrides; "demo" is the packaged configuration."""
    given = read_config(path, overrides)
    if isinstance(given, dict) and "grid" in given:
        raise ValueError(
            f"config {path!r} holds a grid, but one configuration is wanted here: give a file "
            "without it; specdec bench runs grids"
        )
    config = build_config(given)
    if not isinstance(config, BenchConfig):
        raise ValueError(
            f"config {path!r} is of a suite, but a bench is wanted here: give a file without suite"
        )
    return config


def read_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The content of a YAML file, or of a packaged one ("demo", "demo/concurrent" ...)."""
    file = Path(path)
    name = path.removeprefix("demo/").replace("-", "_")
    if path == "demo":
        file = demo_path("bench.yaml")
    elif path.startswith("demo/") and not file.is_file():
        if name not in SUITES:
            raise ValueError(
                f"config {path!r} is neither a file nor a packaged suite; those are "
                + ", ".join(f"demo/{suite.replace('_', '-')}" for suite in SUITES)
            )
        file = demo_path(f"suite-{name.replace('_', '-')}.yaml")
    if changed := [each for each in overrides if each.startswith("suite=")]:
        raise ValueError(
            f"override {changed[0]} would change the suite of the configuration, and each has keys "
            "of its own; give another file"
        )
    return read_yaml(path, file, overrides, example="repeats=1")


def build_config(given: Any) -> RunConfig:
    """The bench or the suite that plain values describe; grids of arms are multiplied out."""
    if not isinstance(given, dict):
        return validated(BenchConfig, given)
    if "arms" in given:
        given = {**given, "arms": expand_arms(given["arms"])}
    if "suite" not in given:
        return validated(BenchConfig, given)
    if str(given["suite"]) not in SUITES:
        raise ValueError(
            f"config suite is {given['suite']!r} but must be one of {', '.join(SUITES)}"
        )
    return validated(SUITES[str(given["suite"])], given)
