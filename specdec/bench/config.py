"""Configurations of benches, suites and grids, behind YAML files and `key=value` overrides."""

import copy
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from specdec.common.config import Config, HasOptions, read_yaml, validated
from specdec.common.files import flat
from specdec.demo import demo_path
from specdec.engine.draft_length import Schedule
from specdec.sampling.config import SamplingConfig
from specdec.targets.options import Placement
from specdec.verify import get_rule

Count = Annotated[int, Field(ge=1)]
Repeats = Annotated[int, Field(ge=1, le=4096)]
SuiteName = Literal["single_turn", "multi_turn", "long_context", "concurrent"]

SINGLE_PROMPT_TYPES = ("hf_assisted", "hf_prompt_lookup")
_MOST_CELLS, _LONGEST_NAME = 10_000, 120


class TargetConfig(Placement):
    """The model whose distribution is kept: arguments of `load_target`."""

    path: str = "demo"
    dtype: str | None = None
    engine: str | None = None
    cache_mode: str | None = None
    cache_tokens: Count | None = None
    compile: Literal[False, True, "auto", "graphs"] = False


class PromptConfig(Config):
    """A named source of prompts (`bench/prompts.py`), a file or a folder of collected queries."""

    source: str = "demo"
    num: Count = 40
    data_dir: str | None = None
    seed: int = 0


class ArmConfig(HasOptions):
    """One strategy: a drafter's type, "hf_assisted" or "hf_prompt_lookup"; with options.

    `draft_length` limits the nodes that a row may draft, by the size of the running batch:
    `{1: 6, 8: 0}`, or `{plan: PATH}` for the controller of a plan.
    """

    name: str = ""
    type: str
    options: dict[str, Any] = Field(default_factory=dict)
    draft_length: dict[Any, Any] | None = None

    @field_validator("draft_length")
    @classmethod
    def _check_schedule(cls, given: dict[Any, Any] | None) -> dict[Any, Any] | None:
        if given is None or (set(given) == {"plan"} and isinstance(given["plan"], str)):
            return given
        # JSON keeps batch sizes under text keys.
        nodes = {int(size) if str(size).isdigit() else size: n for size, n in given.items()}
        try:
            Schedule(nodes)
        except ValueError as error:
            raise ValueError(
                "must map batch sizes to numbers of nodes, as in {1: 6, 8: 0}, or be {plan: PATH} "
                f"of a plan.json: {error}"
            ) from error
        return dict(sorted(nodes.items()))

    @model_validator(mode="after")
    def _fill_name(self) -> "ArmConfig":
        self.name = self.name or self.type
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
        self.with_seed(0)
        return self

    def with_seed(self, seed: int) -> SamplingConfig:
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
    def all_arms(self) -> list[ArmConfig]:
        """The arms, baselines first."""
        return [*(ArmConfig(type=name) for name in self.baselines), *self.arms]

    @property
    def arm_names(self) -> list[str]:
        return [arm.name for arm in self.all_arms]

    @property
    def rows(self) -> int:
        """Requests that are decoded together, at most."""
        return int(getattr(self, "batch_size", getattr(self, "max_rows", 1)))

    @field_validator("arms", mode="before")
    @classmethod
    def _expand_grids(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [each for place, arm in enumerate(given) for each in _expand(arm, f"arms.{place}")]

    @field_validator("arms", "users", "buckets", check_fields=False)
    @classmethod
    def _refuse_twice(cls, given: list[Any], info: ValidationInfo) -> list[Any]:
        names = [getattr(each, "name", each) for each in given]
        if info.field_name == "arms":
            names += cls.baselines
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{info.field_name}: {twice[0]!r} is used twice; rename or drop one")
        return given

    @model_validator(mode="after")
    def _check_run(self) -> "RunConfig":
        get_rule(self.rule)
        for arm in (arm for arm in self.arms if arm.type in SINGLE_PROMPT_TYPES):
            if self.rows > 1 or arm.draft_length or "hf_generate" not in self.baselines:
                raise ValueError(
                    f"arms: {arm.name!r} is transformers' assisted generation, which takes one "
                    f"prompt at a time (here {self.rows}), no draft_length (here "
                    f"{arm.draft_length}) and no part in a suite; drop the arm, or set batch_size=1"
                )
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

    @model_validator(mode="after")
    def _check_bench(self) -> "BenchConfig":
        if self.target.engine:
            raise ValueError(
                f"target.engine is {self.target.engine!r}, but a bench also measures transformers' "
                "generate on the target; measure a suite, as in suite: single_turn"
            )
        if self.prompts_per_call and self.prompts_per_call < self.batch_size:
            raise ValueError(
                f"prompts_per_call is {self.prompts_per_call} but must be 0 or at least "
                f"batch_size, {self.batch_size}"
            )
        return self


class SuiteConfig(RunConfig):
    """A suite: groups of requests; `prompts` is the pool of texts that they are made of."""

    suite: SuiteName
    prompts: PromptConfig = Field(default_factory=lambda: PromptConfig(num=80))
    max_new_tokens: Count = 48


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


class SingleTurnConfig(SuiteConfig):
    """Prompts of several lengths, one turn each."""

    suite: Literal["single_turn"] = "single_turn"
    buckets: list[LengthBucket] = Field(
        default_factory=lambda: [
            LengthBucket(name="short", low=1, high=48),
            LengthBucket(name="medium", low=128, high=256),
            LengthBucket(name="long", low=512, high=1024),
        ],
        min_length=1,
    )


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
    users: list[Count] = Field(default_factory=lambda: [1, 2, 4, 8, 16], min_length=1)
    requests_per_user: Count = 3
    prompt_len: LengthRange = Field(default_factory=LengthRange)
    answer_len: LengthRange = Field(default_factory=lambda: LengthRange(low=16, high=96))
    arrivals: Literal["closed", "poisson"] = "closed"
    rate: Annotated[float, Field(gt=0)] = 1.0
    max_rows: Count = 16
    max_cache_bytes: Count | None = None


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


# --- Files ---


def load_config(path: str, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read the YAML of one bench and overrides; "demo" is the packaged configuration."""
    given = read_config(path, overrides)
    if more := {"grid", "suite"} & set(given if isinstance(given, dict) else ()):
        raise ValueError(
            f"config {path!r} holds a {min(more)}, but one bench is wanted here: give a file "
            "without it; specdec bench runs those"
        )
    return validated(BenchConfig, given)


def read_config(path: str, overrides: Sequence[str] = ()) -> Any:
    suites = [name.replace("_", "-") for name in SUITES]
    packaged = {"demo": "bench.yaml", **{f"demo/{name}": f"suite-{name}.yaml" for name in suites}}
    file, name = Path(path), path.replace("_", "-")
    is_name = path.startswith("demo/") or not file.suffix
    if path == "demo" or (is_name and not file.exists()):
        if name not in packaged:
            raise ValueError(
                f"config {path!r} is neither a file nor packaged; those are {', '.join(packaged)}"
            )
        file = demo_path(packaged[name])
    if changed := [each for each in overrides if each.startswith("suite=")]:
        raise ValueError(
            f"override {changed[0]} would change the suite of the configuration, and each has keys "
            "of its own; give another file"
        )
    return read_yaml(path, file, overrides, example="repeats=1")


def build_config(given: Any) -> RunConfig:
    """The bench or the suite that plain values describe."""
    if not isinstance(given, dict) or "suite" not in given:
        return validated(BenchConfig, given)
    name = str(given["suite"])
    if name not in SUITES:
        raise ValueError(f"config suite is {name!r} but must be one of {', '.join(SUITES)}")
    return validated(SUITES[name], given)


# --- Grids ---


def combinations(grid: Any, where: str) -> list[dict[str, Any]]:
    """Every combination of one value a key of a grid; the last key changes fastest."""
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{where} is {grid!r} but must map keys to lists, as in {{depth: [3, 5]}}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}.{key} is {values!r} but must be a list, as in [1, 2]")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ValueError(f"{where}.{key} holds {twice[0]!r} twice; drop one of them")
    if (num := prod(map(len, grid.values()))) > _MOST_CELLS:
        raise ValueError(f"{where} has {num:,} combinations but must have at most {_MOST_CELLS:,}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _expand(arm: Any, where: str) -> list[Any]:
    """The arms of an arm's grid; what is no mapping is left for the configuration to refuse."""
    if not isinstance(arm, dict) or "grid" not in arm:
        return [arm]
    rest = {key: value for key, value in arm.items() if key != "grid"}
    options = rest.get("options") or {}
    if not isinstance(options, dict):
        return [rest]
    cells = combinations(arm["grid"], f"{where}.grid")
    if both := [key for key in cells[0] if key in options]:
        raise ValueError(
            f"{where}: grid and options both set {both[0]!r}; drop it from one of them"
        )
    return [
        {**rest, "name": _arm_name(rest, options, cell, where), "options": {**options, **cell}}
        for cell in cells
    ]


def _arm_name(arm: dict[str, Any], options: dict[str, Any], cell: Any, where: str) -> str:
    """Name with options in braces filled in, as in "eagle3 {depth}"; without any, cell added."""
    template = str(arm.get("name") or arm.get("type") or "")
    if "{" not in template:
        return " ".join([template, *(f"{key}={in_words(value)}" for key, value in cell.items())])
    known = {key: in_words(value) for key, value in {**options, **cell}.items()}
    try:
        return template.format_map(known)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{where}.name is {template!r}, but what stands in braces must be an option of "
            f"the arm: {', '.join(sorted(known))}"
        ) from error


def in_words(value: Any) -> str:
    """A value as it is shown in names."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep; `name` is its folder's, made from the settings."""

    name: str
    settings: dict[str, Any]
    config: RunConfig


def load_cells(path: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """Read a YAML file whose `grid:` maps keys of the configuration to lists.

    The cells are the cross product, the last key changing fastest. A file without a grid is one
    cell without settings; suites have no grid.
    """
    given = read_config(path, overrides)
    if not isinstance(given, dict) or "grid" not in given or "suite" in given:
        return [Cell("", {}, build_config(given))]
    grid = given.pop("grid")
    grid = dict(flat(grid)) if isinstance(grid, dict) else grid
    settings = combinations(grid, "config grid")
    for key in grid:
        section, _, last = key.rpartition(".")
        if key.partition(".")[0] == "arms":
            raise ValueError(
                f"config grid.{key} is of the arms, which all cells share; put a grid into the "
                "arm, as in {type: eagle3, grid: {depth: [3, 5]}}"
            )
        place = given.get(section) if section else given
        if isinstance(place, dict) and last in place:
            raise ValueError(
                f"config sets both {key} and grid.{key}; drop one of them, or give the one value "
                f"as grid.{key}=[{place[last]}]"
            )
    return [_cell(given, each) for each in settings]


def _cell(given: dict[str, Any], settings: dict[str, Any]) -> Cell:
    whole = copy.deepcopy(given)
    for key, value in settings.items():
        section, _, last = key.rpartition(".")
        place = whole.setdefault(section, {}) if section else whole
        if isinstance(place, dict):  # another thing is refused below
            place[last] = value
    name = _folder_name(settings)
    try:
        return Cell(name, settings, build_config(whole))
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from error


def _folder_name(settings: dict[str, Any]) -> str:
    """A name that any file system takes; different for different settings."""
    short = short_names(list(settings))
    text = ",".join(f"{short[key]}={in_words(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9._,=+-]+", "_", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
