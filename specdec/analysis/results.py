"""The content of `analysis.json`: what is written, what is read, and its JSON schema."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from specdec.bench.config import BenchConfig
from specdec.bench.results import Interval, Record, Results, Share, Whole
from specdec.checkpoints import TargetIdentity
from specdec.common.provenance import MachineProvenance

TokenClass = Literal[
    "special", "newline", "space", "digit", "punctuation", "word_start", "word_piece", "other"
]


class AnalyzedPrompt(Record):
    """A prompt, and the text after it."""

    id: str
    domain: str
    num_tokens: Whole
    """tokens of the prompt"""
    new_tokens: Whole
    """tokens of the text after it"""
    fingerprint: str


class ExpectedFigures(Record):
    """Expected acceptance of a draft shape."""

    tau: float
    """expected accepted length, 1 + A / S"""
    tau_ci: Interval
    nodes_per_step: float
    """D / S"""
    nodes_are_exact: bool
    """false where a threshold ends sampled chains"""


class ConfiguredFigures(ExpectedFigures):
    """Expected acceptance of the draft as the configuration has it."""

    tokens: list[float]
    """emitted tokens of each text"""
    steps: list[float]
    """expected verify steps of each text"""
    accepted_at: list[float]
    """expected steps that accept at depth 1, 2, ..."""
    tested_at: list[float]
    """expected steps that judge a token at depth 1, 2, ..."""


class ChainFigures(ExpectedFigures):
    """A chain."""

    length: int
    children: str


class TreeFigures(ExpectedFigures):
    """The best static tree of so many chosen tokens, for these texts' coverage."""

    nodes: int
    depth: int
    choices: list[list[int]]
    children: str


class ThresholdFigures(ExpectedFigures):
    """The longest chain, ended by a confidence threshold."""

    threshold: float
    length: int


class Counterfactuals(Record):
    """Other shapes of the same drafter along the same texts; empty where it has none."""

    chains: list[ChainFigures] = Field(default_factory=list)
    trees: list[TreeFigures] = Field(default_factory=list)
    thresholds: list[ThresholdFigures] = Field(default_factory=list)


class CalibrationBin(Record):
    """Drafted tokens whose confidence is at least `low` and below `high`."""

    low: float
    high: float
    count: Whole
    confidence: Share | None
    acceptance: Share | None


class Calibration(Record):
    """Confidence against acceptance."""

    bins: list[CalibrationBin]
    ece: Share
    """expected calibration error"""


class FirstToken(Record):
    """First drafted tokens at some places."""

    count: Whole
    alpha: Share | None
    """mean of sum_x min(p(x), q(x))"""
    acceptance: Share | None
    """chance that the configured draft takes its first token"""


class EntropyBin(FirstToken):
    """Places by the target's entropy in nats, at temperature 1."""

    low: float
    high: float | None
    """null: no end"""


class TokenClassBin(FirstToken):
    """Places by the token that came."""

    name: TokenClass


class PositionBin(FirstToken):
    """Places by the token's place in its answer, from 0; `high` is not included."""

    low: int
    high: int


class HardContext(Record):
    """A place where drafter and target disagree."""

    prompt: int
    """index into prompts"""
    position: int
    """index of the token in its answer, from 0"""
    before: str
    """text up to it"""
    drafted: list[str]
    """the drafter's likeliest token"""
    target: str
    """the token that came"""
    p: float
    """the target's probability of it, at temperature 1"""
    q: float
    """the drafter's"""
    overlap: float


class DrafterAnalysis(Record):
    """Everything that is worked out for one drafter; the defaults are a replay's."""

    name: str
    type: str
    options: dict[str, Any]
    method: Literal["evidence", "replay"]
    """one teacher-forced pass, or the drafter driven along the texts"""
    alpha: Share | None = None
    """mean of sum_x min(p(x), q(x)) over all places, at the sampling settings"""
    alpha_ci: Interval = None
    configured: ConfiguredFigures | None
    not_configured_because: str | None = None
    """why the configured draft is not worked out"""
    per_depth_conditional: list[Share | None]
    """shares of the configured draft: accepted over tested at depth 1, 2, ..."""
    impossible: Share | None = None
    """share of tokens that the target would never emit at these settings"""
    coverage: list[list[Share]] = Field(default_factory=list)
    """`[depth][rank]` share of places whose token is the candidate of that rank, where one of the
    first ten was taken at every depth above"""
    calibration: Calibration | None
    entropy_bins: list[EntropyBin]
    token_classes: list[TokenClassBin]
    """empty without a tokenizer"""
    positions: list[PositionBin]
    hardest: list[HardContext] = Field(default_factory=list)
    """places of lowest overlap"""
    expected: Counterfactuals = Field(default_factory=Counterfactuals)


class AnalysisProvenance(MachineProvenance):
    """Configuration and texts of an analysis, and where it ran."""

    config: BenchConfig
    config_fingerprint: str
    """hash of configuration and texts"""
    text: str | None
    """path of the texts; null for the target's answers"""


class Analysis(Results):
    """The acceptance of every drafter of a bench's configuration along texts.

    Everything is expected, nothing measured. Intervals are 95 % bootstraps over prompts.
    """

    FILE: ClassVar[str] = "analysis.json"

    schema_: Literal["specdec-analysis-1"] = Field(default="specdec-analysis-1", alias="schema")
    provenance: AnalysisProvenance
    target: TargetIdentity
    prompts: list[AnalyzedPrompt]
    drafters: list[DrafterAnalysis]
    left_out: list[str]
    """arms that are no drafters of the package"""
