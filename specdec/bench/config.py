"""What a bench runs, as strict dataclasses behind YAML and `key=value` overrides."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from specdec.common.config import build_strict, read_yaml, require_at_least, require_at_most
from specdec.demo import demo_path
from specdec.engine.draft_length import Schedule
from specdec.sampling.config import SamplingConfig
from specdec.verify import get_rule

_MOST = 10_000


def cross_product(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value a key; the last key changes fastest.

    Raises:
        ValueError: there are more of them than anyone can run.
    """
    if (num := prod(map(len, axes.values()))) > _MOST:
        raise ValueError(f"config grid has {num:,} combinations but must have at most {_MOST:,}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_axis(where: str, values: Any) -> list[Any]:
    """Refuse what is no list of different values.

    Args:
        where: the key in the file, for messages.
        values: what stands there.

    Raises:
        ValueError: it is no list, is empty, or holds a value twice.
    """
    if not isinstance(values, list):
        raise ValueError(f"config {where} is {values!r} but must be a list of values, as in [1, 2]")
    if not values:
        raise ValueError(f"config {where} is an empty list but must hold at least one value")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"config {where} holds {value!r} twice; drop one of them")
    return values


def in_words(value: Any) -> str:
    """A value as it is shown in names."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def expand_arms(arms: Any) -> Any:
    """Replace every arm that has a grid by one arm a combination.

    Args:
        arms: as they stand in the file. A name may hold options in braces, as in
            "eagle3 {depth}x{width}"; without any, the values are added to it.

    Returns:
        Arms without grids; what is no list of mappings is returned for others to refuse.

    Raises:
        ValueError: a grid that is no mapping from options to lists, an option that is set twice,
            or a name with an option that is not there.
    """
    if not isinstance(arms, list):
        return arms
    return [each for place, arm in enumerate(arms) for each in _expand(arm, f"arms.{place}")]


def _expand(arm: Any, where: str) -> list[Any]:
    if not isinstance(arm, dict) or "grid" not in arm:
        return [arm]
    rest = {key: value for key, value in arm.items() if key != "grid"}
    options = rest.get("options") or {}
    if not isinstance(options, dict):
        return [rest]
    axes = _axes(arm["grid"], options, f"{where}.grid")
    return [
        {**rest, "name": _name(rest, options, values, where), "options": {**options, **values}}
        for values in cross_product(axes)
    ]


def _axes(grid: Any, options: dict[str, Any], where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config {where} is {grid!r} but must map options of the arm to lists, as in "
            "{depth: [3, 5]}"
        )
    if both := [key for key in grid if key in options]:
        raise ValueError(
            f"config {where} and the arm's options both set {both[0]!r}; drop it from one of them"
        )
    return {key: check_axis(f"{where}.{key}", values) for key, values in grid.items()}


def _name(arm: dict[str, Any], options: dict[str, Any], values: dict[str, Any], where: str) -> str:
    template = str(arm.get("name") or arm.get("type") or "")
    if "{" not in template:
        return " ".join([template, *(f"{key}={in_words(v)}" for key, v in values.items())])
    known = {key: in_words(value) for key, value in {**options, **values}.items()}
    try:
        return template.format_map(known)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"config {where}.name is {template!r}, but what stands in braces must be an option of "
            f"the arm: {', '.join(sorted(known))}"
        ) from error


Option = dict[Any, Any] | None


def check_draft_length(arm: str, option: Option) -> Option:
    """Refuse what is neither `{batch size: nodes}` nor `{plan: PATH}`.

    Args:
        arm: name, for messages.
        option: the arm's `draft_length`.

    Returns:
        The option, its batch sizes in order.

    Raises:
        ValueError: another key, or a number that cannot be.
    """
    if option is None or (set(option) == {"plan"} and isinstance(option["plan"], str)):
        return option
    try:
        Schedule(option)
    except ValueError as error:
        raise ValueError(
            f"config arms: draft_length of {arm!r}: {error}; it must map batch sizes to numbers of "
            "nodes, as in {1: 6, 8: 0}, or be {plan: PATH} of a plan.json"
        ) from error
    return dict(sorted(option.items()))


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


@dataclass
class LengthBucket:
    """Prompts of `low` to `high` tokens, both included, and how many of them."""

    name: str = ""
    low: int = 1
    high: int = 64
    num: int = 6


def usual_buckets() -> list[LengthBucket]:
    """Short, medium and long prompts."""
    return [
        LengthBucket("short", 1, 48),
        LengthBucket("medium", 128, 256),
        LengthBucket("long", 512, 1024),
    ]


@dataclass
class LengthRange:
    """Lengths drawn evenly from `low` to `high` tokens, both included."""

    low: int = 16
    high: int = 256


_DEMO = "demo/"
ARRIVALS = ("closed", "poisson")


def _pool() -> PromptConfig:
    """Every text of the packaged prompts."""
    return PromptConfig(num=80)


@dataclass
class SuiteConfig:
    """What all suites share; "plain" is always measured beside the arms.

    `prompts` is the pool of texts that the suite's requests are made of.
    """

    suite: str = ""
    target: TargetConfig = field(default_factory=TargetConfig)
    prompts: PromptConfig = field(default_factory=_pool)
    arms: list[ArmConfig] = field(
        default_factory=list, metadata={"rule": "a list, each like {type: ngram}"}
    )
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int = 48
    repeats: int = 3
    seed: int = 0
    threads: int = 2
    rule: str = "token"

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            ValueError: by key, with the rule and the fix.
        """
        require_at_least(self, 1, "max_new_tokens", "repeats", "threads")
        require_at_most(self, 4096, "repeats", "threads")
        require_at_least(self.prompts, 1, "num", prefix="prompts.")
        get_rule(self.rule)
        try:
            SamplingConfig(**vars(self.sampling))
        except ValueError as error:
            raise ValueError(f"config sampling.{error}") from error
        self._check_arms()

    def _check_arms(self) -> None:
        for arm in self.arms:
            arm.name = arm.name or arm.type
            arm.draft_length = check_draft_length(arm.name, arm.draft_length)
            if arm.type in SINGLE_PROMPT_TYPES:
                raise ValueError(
                    f"config arms: {arm.name!r} is transformers' assisted generation, but rows "
                    "join and leave a suite's batch, which only our own loop does; drop the arm, "
                    "or compare with it in a bench without suite"
                )
        names = ["plain", *(arm.name for arm in self.arms)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"config arms: the name {min(twice)!r} is used twice; rename one arm")


@dataclass
class SingleTurnConfig(SuiteConfig):
    """Prompts of several lengths, one turn each."""

    buckets: list[LengthBucket] = field(
        default_factory=usual_buckets,
        metadata={"rule": "a list, each like {name: short, low: 1, high: 48}"},
    )

    def check(self) -> None:
        """See `SuiteConfig`."""
        super().check()
        for index, bucket in enumerate(self.buckets):
            prefix = f"buckets.{index}."
            bucket.name = bucket.name or f"{bucket.low}-{bucket.high}"
            require_at_least(bucket, 1, "low", "num", prefix=prefix)
            require_at_least(bucket, bucket.low, "high", prefix=prefix)
        _refuse_twice("buckets", [bucket.name for bucket in self.buckets])


@dataclass
class MultiTurnConfig(SuiteConfig):
    """Conversations of several turns, each asked after the target's own answers."""

    turns: int = 10
    conversations: int = 6

    def check(self) -> None:
        """See `SuiteConfig`."""
        super().check()
        require_at_least(self, 1, "turns", "conversations")


@dataclass
class LongContextConfig(SuiteConfig):
    """Conversations that fill the context up to one edge after the other.

    `context_len` is the last edge; None is the target's limit.
    """

    context_len: int | None = None
    bins: int = 8
    num: int = 4

    def check(self) -> None:
        """See `SuiteConfig`."""
        super().check()
        require_at_least(self, 1, "bins", "num", "context_len")


@dataclass
class ConcurrentConfig(SuiteConfig):
    """Users at the same time, each with requests of its own lengths.

    With `arrivals` "closed" a user's next request follows at once; with "poisson" each user sends
    `rate` requests a second on average, whether the one before is answered or not.
    `answer_len` bounds the new tokens of a request; `max_new_tokens` is not used.
    """

    users: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16],
        metadata={"rule": "a list of numbers of users, like [1, 4]"},
    )
    requests_per_user: int = 3
    prompt_len: LengthRange = field(default_factory=LengthRange)
    answer_len: LengthRange = field(default_factory=lambda: LengthRange(16, 96))
    arrivals: str = "closed"
    rate: float = 1.0
    max_rows: int = 16
    max_cache_bytes: int | None = None

    def check(self) -> None:
        """See `SuiteConfig`."""
        super().check()
        if not self.users or min(self.users) < 1:
            raise ValueError(f"config users is {self.users} but must list numbers of at least 1")
        _refuse_twice("users", [str(num) for num in self.users])
        require_at_least(self, 1, "requests_per_user", "max_rows", "max_cache_bytes")
        for name in ("prompt_len", "answer_len"):
            lengths = getattr(self, name)
            require_at_least(lengths, 1, "low", prefix=f"{name}.")
            require_at_least(lengths, lengths.low, "high", prefix=f"{name}.")
        if self.arrivals not in ARRIVALS:
            raise ValueError(
                f"config arrivals is {self.arrivals!r} but must be {' or '.join(ARRIVALS)}"
            )
        if not self.rate > 0:
            raise ValueError(f"config rate is {self.rate} but must be above 0 requests a second")


SUITES: dict[str, type[SuiteConfig]] = {
    "single_turn": SingleTurnConfig,
    "multi_turn": MultiTurnConfig,
    "long_context": LongContextConfig,
    "concurrent": ConcurrentConfig,
}


def _refuse_twice(key: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"config {key} is empty but must hold at least one entry")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"config {key}: {min(twice)} is there twice; drop one")


def is_suite(path: str) -> bool:
    """Whether a configuration is a suite's: "demo/NAME", or a YAML file with a key `suite`."""
    return (path.startswith(_DEMO) and not Path(path).is_file()) or _suite_of(path) is not None


def load_suite(path: str, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read YAML and overrides; "demo/concurrent" and so on are the packaged configurations.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a suite or a key that does not exist, or a value that cannot be.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"config {path!r} is not a file; give a YAML file")
    name = _suite_of(str(file))
    if name not in SUITES:
        raise ValueError(f"config suite is {name!r} but must be one of {', '.join(SUITES)}")
    given = read_yaml(path, file, overrides, example="repeats=1")
    if isinstance(given, dict) and "arms" in given:
        given = {**given, "arms": expand_arms(given["arms"])}
    config = build_strict(SUITES[name], given)
    if config.suite != name:
        raise ValueError(
            f"override suite={config.suite} changes the suite of a {name} configuration, which has "
            "keys of its own; give another file"
        )
    config.check()
    return config


def _file(path: str) -> Path:
    if Path(path).is_file() or not path.startswith(_DEMO):
        return Path(path)
    name = path.removeprefix(_DEMO)
    if name.replace("-", "_") not in SUITES:
        raise ValueError(
            f"config {path!r} is neither a file nor a packaged suite; those are "
            + ", ".join(f"{_DEMO}{suite.replace('_', '-')}" for suite in SUITES)
        )
    return demo_path(f"suite-{name.replace('_', '-')}.yaml")


def _suite_of(path: str) -> str | None:
    """The `suite` of a YAML file; None where there is no such file or key."""
    if not Path(path).is_file():
        return None
    try:
        given = read_yaml(path, Path(path))
    except ValueError:
        return None  # who reads it as a bench says what is wrong
    return str(given["suite"]) if isinstance(given, dict) and "suite" in given else None
