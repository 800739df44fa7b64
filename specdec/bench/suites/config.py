"""What a suite runs, as strict dataclasses behind YAML and `key=value` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specdec.bench.arm_grid import expand_arms
from specdec.bench.config import (
    SINGLE_PROMPT_TYPES,
    ArmConfig,
    PromptConfig,
    SamplingOptions,
    TargetConfig,
)
from specdec.bench.draft_length import check_draft_length
from specdec.bench.suites.lengths import LengthBucket, LengthRange, usual_buckets
from specdec.demo import demo_path
from specdec.sampling_config import SamplingConfig
from specdec.strict_config import build_strict, read_yaml, require_at_least, require_at_most
from specdec.verify import get_rule

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
