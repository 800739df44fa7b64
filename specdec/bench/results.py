"""Results of benches, suites and sweeps: what is written, what is read, and their JSON schemas.

Keys of the files are the names of the fields; docs/bench.md and docs/suites.md define them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdec.bench.config import AnySuite, BenchConfig, SuiteName
from specdec.checkpoints.head import TargetIdentity
from specdec.common.config import write_model
from specdec.common.provenance import CodeProvenance, MachineProvenance

Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float] | None  # 95 % bootstrap over prompts; None for fewer than two
Percentiles = dict[str, float]  # "p50" and so on -> seconds; empty without a value


class Record(BaseModel):
    """A part of a results file: no key that is not described."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Memory(Record):
    """The largest figures of some calls; None where none was taken."""

    peak_rss_bytes: Whole | None
    """resident size of the process; of these calls where the system lets a peak be set back"""
    peak_device_bytes: Whole | None
    cache_bytes: Whole | None
    """keys and values of all rows; null for transformers' arms"""


class Power(Record):
    """Draw and use of the whole device by NVML, and of CPUs; None where they were not measured."""

    energy_j: float | None
    power_w: float | None
    energy_j_per_token: float | None
    tokens_per_j: float | None = None
    gpu_utilization: float | None = None
    """share of the time that a kernel ran"""
    gpu_memory_bytes: float | None = None
    """at most, other processes included"""
    cpu_cores: float | None = None
    """CPU seconds of the process over seconds"""


class StepTimes(Record):
    """Seconds of all steps, a batch's counted once."""

    draft: float
    target: float
    verify: float | None = None
    commit: float | None = None
    other: float
    wall: float


class Speeds(Record):
    """Tau and the speeds that stand for an arm, over some prompts."""

    tau: float | None
    """1 + accepted / steps, tokens a target forward; null for transformers' arms"""
    tau_ci: Interval
    decode_tokens_per_s: float | None
    """total tokens after the first chunks over their total seconds, of a row"""
    decode_tokens_per_s_ci: Interval
    speedup_vs_plain: float | None
    """total decode seconds of plain over the arm's, over the prompts that both decoded"""
    speedup_vs_plain_ci: Interval


class BenchSpeeds(Speeds):
    """Speeds with transformers' generate as a second baseline."""

    speedup_vs_hf: float | None
    speedup_vs_hf_ci: Interval


class DomainFigures(BenchSpeeds):
    """An arm's figures over the prompts of one domain."""

    prompts: Whole


class ArmFigures(Speeds):
    """Figures that every arm has, in benches and in suites."""

    name: str
    mean_speedup_vs_plain: float | None
    """mean over prompts of their ratios, which short, easy answers dominate"""
    end_to_end_speedup_vs_plain: float | None
    """the same with prefill, and with the queue of a suite"""
    end_to_end_speedup_vs_plain_ci: Interval
    acceptance_rate: float | None
    """accepted / drafted; for a tree every node that was verified counts"""
    per_depth: list[Share]
    """steps that accepted at depth 1, 2, ... over all steps; they sum to tau - 1"""
    per_depth_conditional: list[Share]
    """the same over the steps that tested that depth"""
    loop_efficiency: float | None
    time_s: StepTimes
    ttft_s: Percentiles
    """percentiles over prompts of the median of their repeats; in a suite queue included"""
    itl_s: Percentiles
    """a prompt's mean time between its tokens after the first chunk"""
    tokens: Whole
    failed: Whole
    """prompts that failed in any repeat; they are not timed"""
    mismatches: Whole | None
    """prompts whose greedy tokens differ from a baseline's; null when sampling"""


class Difference(Record):
    """The first place where an arm's greedy tokens left a baseline's."""

    position: Whole
    """place of the first output token that differs"""
    top2_gap: Annotated[float, Field(ge=0)] | None
    """gap between the target's two best logits there; null if only one token is allowed"""


class PromptDifference(Difference):
    """A difference in a bench; `prompt` is its place in `prompts`."""

    prompt: Whole
    against: str


class RequestDifference(Difference):
    """A difference from plain decoding in a suite."""

    request: str


class PromptFailure(Record):
    """A prompt that an arm failed on, in one repeat."""

    prompt: Whole
    repeat: Whole
    reason: str


class RequestFailure(Record):
    """A request that an arm failed on, in one repeat."""

    request: str
    repeat: Whole
    reason: str


class PromptFigures(Record):
    """Figures of one prompt; counts are sums over its repeats."""

    steps: Whole
    drafted: Whole
    accepted: Whole
    tokens: Whole
    tau: float | None
    decode_tokens: float | None
    """mean of its repeats, after the first chunk"""
    decode_s: float | None
    """their seconds at the median speed"""
    decode_tokens_per_s: float | None
    speedup_vs_plain: float | None
    finish: Literal["eos", "length"]


class Finish(Record):
    """Prompts by what ended them in the first repeat."""

    eos: Whole
    length: Whole


class BenchArm(ArmFigures, BenchSpeeds):
    """One arm of a bench."""

    type: str = ""
    options: dict[str, Any] = {}
    compile_mode: str = "eager"
    """what most of its calls ran in: eager, inductor or graphs"""
    draft_length: dict[str, Any] | None = None
    """the most nodes a row may draft by size of the running batch, or {"plan": path}"""
    batch_tokens_per_s: float | None
    """tokens of all rows over the wall time of their calls, prefills included"""
    batch_decode_tokens_per_s: float | None
    other_ms_per_step: float | None
    peak_rss_bytes: Whole | None = None
    peak_device_bytes: Whole | None
    cache_bytes: Whole | None
    power: Power | None = None
    domains: dict[str, DomainFigures] = {}
    per_prompt: list[PromptFigures | None] | None = None
    """in the order of prompts; null for one that failed in every repeat"""
    finish: Finish | None = None
    differences: list[PromptDifference]
    failures: list[PromptFailure]
    prompts: Whole


def fastest_plain(arms: Sequence[ArmFigures]) -> str:
    """Name the fastest plain arm, over which the ratio quoted first is."""
    speeds = {arm.name: arm.decode_tokens_per_s or 0.0 for arm in arms}
    return max(BenchConfig.baselines, key=lambda name: speeds.get(name, 0.0))


def over_fastest(fastest: str, arm: ArmFigures) -> dict[str, Any]:
    """Give the ratio quoted first: over the fastest plain arm."""
    key = "speedup_vs_plain" if fastest == "plain" else "speedup_vs_hf"
    return {"speedup": getattr(arm, key), "speedup_ci": getattr(arm, f"{key}_ci")}


class Load(Record):
    """Figures of users at the same time; ranges are from the lowest to the highest repeat."""

    users: Whole
    tokens_per_s: float | None
    tokens_per_s_range: Interval
    full_load_tokens_per_s: float | None
    """the same until the first user has nothing left to ask"""
    tokens_per_s_vs_plain: float | None
    tokens_per_s_vs_plain_range: Interval
    user_tokens_per_s: list[float | None]
    """each user's tokens over the seconds waited for them, queue and prefill included"""
    user_tokens_per_s_mean: float | None
    user_tokens_per_s_mean_ci: Interval
    user_speed_vs_plain: float | None
    """tokens of all requests over the seconds waited for them, over the same of plain decoding"""
    user_speed_vs_plain_ci: Interval
    jain_index: float | None
    worst_over_mean: float | None


class SuiteArm(ArmFigures):
    """One arm in one group of a suite."""

    chunk_gap_s: Percentiles
    """time from one chunk of a request to the next, over all gaps of all requests and repeats"""
    queue_s: Percentiles
    latency_s: Percentiles
    requests: Whole
    differences: list[RequestDifference]
    failures: list[RequestFailure]
    memory: Memory
    power: Power
    load: Load | None
    """users at the same time; null in the other suites"""


class PromptInfo(Record):
    """A prompt of a bench."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    domain: str
    num_tokens: int
    fingerprint: str


class RequestInfo(PromptInfo):
    """A request of a suite."""

    user: Whole
    max_new_tokens: int
    arrival_s: float | None
    """seconds after the start; null for as soon as the user's one before is answered"""


class GroupResults(Record):
    """Requests told by one row, and what each arm gave."""

    name: str
    value: int
    """place on the axis: the largest number of tokens, the turn, or the number of users"""
    requests: list[RequestInfo]
    arms: list[SuiteArm]


class BenchProvenance(MachineProvenance):
    """Configuration of a bench as resolved, and where it ran."""

    config: BenchConfig
    config_fingerprint: str
    processes: int = 1


class SuiteProvenance(MachineProvenance):
    """Configuration of a suite as resolved, and where it ran."""

    config: AnySuite
    config_fingerprint: str


class SweepProvenance(CodeProvenance):
    """The command that joined the cells; each cell's results tell of its own machine."""

    processes: int = 1


class Results(Record):
    """A whole results file."""

    FILE: ClassVar[str]
    NOUN: ClassVar[str] = ""

    @classmethod
    def read(cls, content: Any) -> Self:
        """Make the model from parsed JSON; a `ValueError` names the first key that is wrong."""
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{key}: {first['msg']}; restore the file, or run it again") from error

    def write(self, folder: Path) -> None:
        """Replace the file in its folder."""
        write_model(folder / self.FILE, self)


class BenchResults(Results):
    """results.json of a bench."""

    FILE = "results.json"
    NOUN = "prompt"

    schema_: Literal["specdec-bench-3"] = Field(default="specdec-bench-3", alias="schema")
    provenance: BenchProvenance
    target: TargetIdentity | None = None
    prompts: list[PromptInfo] | None = None
    memory: Memory
    arms: list[BenchArm]


class SuiteResults(Results):
    """suite.json of a suite."""

    FILE = "suite.json"
    NOUN = "request"

    schema_: Literal["specdec-suite-2"] = Field(default="specdec-suite-2", alias="schema")
    suite: SuiteName
    provenance: SuiteProvenance
    memory: Memory
    groups: list[GroupResults]


class CellResults(Record):
    """One configuration of a sweep."""

    name: str
    settings: dict[str, Any]
    folder: str
    error: str | None
    """why the cell failed; null for one that stands"""
    arms: list[BenchArm]


class SweepResults(Results):
    """sweep.json of a grid."""

    FILE = "sweep.json"

    schema_: Literal["specdec-sweep-2"] = Field(default="specdec-sweep-2", alias="schema")
    provenance: SweepProvenance
    cells: list[CellResults]
