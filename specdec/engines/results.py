"""A bake-off's configuration and results, which are read where nothing can ask a server."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from specdec.bench import results as models
from specdec.bench.config import AnySuite, BenchConfig, Count
from specdec.checkpoints import TargetIdentity
from specdec.common.config import Config
from specdec.common.provenance import MachineProvenance


class EndpointConfig(Config):
    """A server that runs at `url`, or an `engine` to start; with a drafter, or plain without one.

    An engine is started by `launch`, or as `specdec export` says, with `flags` behind it. `load`
    names JSON reports of GuideLLM on the same server.
    """

    name: str = ""
    engine: str = ""
    url: str | None = None
    model: str | None = None
    api_key_variable: str = "SPECDEC_API_KEY"
    timeout_s: float = Field(600.0, gt=0)
    drafter: str | dict[str, Any] | None = None
    num_draft_tokens: Count = 5
    launch: list[str] = Field(default=[])
    flags: list[str] = Field(default=[])
    load: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> "EndpointConfig":
        if not (self.url or self.engine):
            raise ValueError("endpoints: one has neither url, of a server that runs, nor engine")
        drafter = self.drafter["type"] if isinstance(self.drafter, dict) else self.drafter
        self.name = self.name or " ".join(filter(None, [self.engine or "endpoint", drafter]))
        return self


class BakeOffConfig(Config):
    """A bench or a suite, and the endpoints that are asked, one request after the other."""

    run: BenchConfig | AnySuite
    endpoints: list[EndpointConfig] = Field(min_length=1)
    rows: ClassVar[int] = 1

    @field_validator("endpoints")
    @classmethod
    def _refuse_twice(cls, given: list[EndpointConfig]) -> list[EndpointConfig]:
        names = [each.name for each in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"endpoints: {twice[0]!r} is used twice; rename or drop one")
        return given


class BakeOffArm(models.SuiteArm):
    """An endpoint over all requests; plain is the fastest arm without a drafter."""

    engine: str
    drafter: Any
    served: str | None
    """model, version, and how prompts and answers went over the line; null if none did"""
    speedup_vs_engine_plain: float | None
    """the same over the fastest plain arm of its own engine"""
    speedup_vs_engine_plain_ci: models.Interval


class LoadFigures(models.Record):
    """One benchmark of a GuideLLM report; figures are of the requests that succeeded."""

    name: str
    load: str
    requests: int
    failed: int
    tokens_per_s: float
    ttft_s: models.Percentiles
    itl_s: models.Percentiles
    latency_s: models.Percentiles


class BakeOffProvenance(MachineProvenance):
    """Configuration as resolved, and the machine that asked."""

    config: BakeOffConfig
    config_fingerprint: str


class BakeOffResults(models.Results):
    """bake-off.json of a bake-off, or of an endpoint alone."""

    FILE = "bake-off.json"
    NOUN = "request"

    schema_: Literal["specdec-bake-off-1"] = Field(default="specdec-bake-off-1", alias="schema")
    provenance: BakeOffProvenance
    target: TargetIdentity
    baseline: str | None
    """the fastest plain arm"""
    choice: list[str]
    """the fastest arm that answered all requests, and those that are not told from it"""
    arms: list[BakeOffArm]
    groups: list[models.GroupResults]
    """each group of a suite by itself; none where there is one"""
    loads: list[LoadFigures]
