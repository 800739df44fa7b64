"""Estimates for hardware that is not here: a roofline of stated parameters, nothing measured.

Source: Williams et al. 2009, doi 10.1145/1498765.1498785; expected tokens: Leviathan et al. 2022,
arXiv 2211.17192, section 3.1.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from specdec.bench.results import Record, Results
from specdec.common.config import Config, load_config
from specdec.common.provenance import CodeProvenance, code

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Reached = Annotated[float, Field(gt=0, le=1)]
STATE_BYTES = 2  # of a number that goes from device to device


def _check_alpha(given: Any) -> Any:
    """Refuse what is no probability, or no list of them; a union's own errors would name both."""
    values = given if isinstance(given, list) else [given]
    if not values or not all(type(v) in (int, float) and 0 <= v <= 1 for v in values):
        raise ValueError("must be a number in [0, 1], or a list of them, one a depth")
    return given


class Device(Config):
    """A device.

    Attributes:
        name: for drafters to say where they run.
        bandwidth_tb_s: memory bandwidth, TB/s.
        compute_tflops: dense, in the type that is multiplied in, TFLOP/s.
        memory_gb: GB; None if it does not matter.
        share: part of the target's layers or, split by tensors, of each layer; None for a share in
            proportion to the bandwidth. Either all devices state one or none does.
    """

    name: str = ""
    bandwidth_tb_s: Positive
    compute_tflops: Positive
    memory_gb: NotNegative | None = None
    share: NotNegative | None = None


class Link(Config):
    """The link that joins the devices; one of its transfers follows the other."""

    bandwidth_gb_s: Positive = 32.0
    latency_us: NotNegative = 10.0


class Efficiency(Config):
    """Shares of the stated bandwidth and compute that a forward reaches."""

    bandwidth: Reached = 0.7
    compute: Reached = 0.5


class Model(Config):
    """A language model.

    Attributes:
        name: for the table.
        parameters_b: weights that a forward reads, billions.
        bits: bits of a weight, scales included.
        kv_bytes_per_token: bytes of keys and values, all layers.
        num_layers: for what a tensor split sends.
        hidden_size: size of the state that goes from device to device.
        overhead_us: time of a forward beside memory and compute: launches, sampling.
    """

    name: str = "target"
    parameters_b: Positive
    bits: Positive = 16.0
    kv_bytes_per_token: NotNegative = 0.0
    num_layers: Annotated[int, Field(ge=1)] = 1
    hidden_size: Annotated[int, Field(ge=0)] = 0
    overhead_us: NotNegative = 0.0

    def memory_gb(self, rows: int, context: int) -> float:
        """Weights, keys and values."""
        cache_gb = rows * context * self.kv_bytes_per_token / 1e9
        return self.parameters_b * self.bits / 8 + cache_gb


class DraftModel(Model):
    """A draft model, whole on one device.

    Attributes:
        device: name of a device.
        alpha: probability that a drafted token is accepted, one number for all depths or the
            conditional one of each depth, the last of which holds behind the list's end.
    """

    device: str = ""
    alpha: Annotated[float | list[float], BeforeValidator(_check_alpha)]

    def alphas(self, depth: int) -> list[float]:
        """Conditional acceptance at depths 1 to `depth`."""
        given = self.alpha if isinstance(self.alpha, list) else [self.alpha]
        return [given[min(level, len(given) - 1)] for level in range(depth)]


class Hardware(Config):
    """The inputs of a roofline estimate.

    Attributes:
        split: "pipeline" puts the target's layers one after the other, so that times add; "tensor"
            divides every layer, so that the slowest device decides.
        context: tokens cached in every row.
        batch_sizes: rows.
        max_draft_tokens: longest chain that is tried.
    """

    target: Model
    devices: Annotated[list[Device], Field(min_length=1)]
    drafters: Annotated[list[DraftModel], Field(min_length=1)]
    link: Link = Field(default_factory=Link)
    efficiency: Efficiency = Field(default_factory=Efficiency)
    split: Literal["pipeline", "tensor"] = "pipeline"
    context: Annotated[int, Field(ge=0)] = 2048
    batch_sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        default_factory=lambda: [1]
    )
    max_draft_tokens: Annotated[int, Field(ge=1)] = 12

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [device.name for device in self.devices]
        if len(set(names)) < len(names):
            raise ValueError(f"devices: the names {names} must differ")
        shares = [device.share for device in self.devices]
        known = [share for share in shares if share is not None]
        if known and (len(known) < len(shares) or abs(sum(known) - 1) > 1e-3):
            raise ValueError(
                f"devices: the shares {shares} must sum to 1, every device with one, or be left "
                "out of all"
            )
        for index, drafter in enumerate(self.drafters):
            if drafter.device not in names:
                raise ValueError(
                    f"drafters.{index}.device is {drafter.device!r} but must be one of "
                    f"{', '.join(names)}"
                )
        # Between devices states travel: what is left out would cost nothing.
        if len(names) > 1 and not self.target.hidden_size:
            raise ValueError("target.hidden_size is 0 but must be above 0; state it")
        if len(names) > 1 and self.split == "tensor" and self.target.num_layers < 2:
            raise ValueError(
                f"target.num_layers is {self.target.num_layers} but must be at least 2 for a "
                "tensor split; state it"
            )
        return self

    @property
    def shares(self) -> list[float]:
        """Shares of the target on each device, summing to 1."""
        if self.devices[0].share is not None:
            return [device.share or 0.0 for device in self.devices]
        total = sum(device.bandwidth_tb_s for device in self.devices)
        return [device.bandwidth_tb_s / total for device in self.devices]


def load_hardware(path: str, overrides: Sequence[str] = ()) -> Hardware:
    """Read stated parameters from YAML."""
    return load_config(Hardware, path, Path(path), overrides, example="context=4096")


class LengthEstimate(Record):
    """Chains of so many draft tokens."""

    num_draft_tokens: int
    estimated_tau: float
    estimated_step_ms: float
    estimated_speedup: float
    estimated_tokens_per_s: float
    """a row"""


class DrafterEstimate(Record):
    """A draft model at one batch size."""

    name: str
    batch_size: int
    alpha: float | list[float]
    estimated_draft_forward_ms: float
    best: LengthEstimate
    lengths: list[LengthEstimate]


class TargetEstimate(Record):
    """The target at one batch size."""

    batch_size: int
    estimated_forward_ms: float
    estimated_plain_tokens_per_s: float
    """a row"""


class Estimate(Results):
    """Figures from stated parameters, none of them measured."""

    FILE: ClassVar[str] = "estimate.json"

    schema_: Literal["specdec-estimate-1"] = Field(default="specdec-estimate-1", alias="schema")
    label: Literal["estimate: nothing here was measured"] = "estimate: nothing here was measured"
    provenance: CodeProvenance
    parameters: dict[str, Any]
    """as stated, defaults included"""
    assumptions: list[str]
    target: list[TargetEstimate]
    drafters: list[DrafterEstimate]
    """by batch size, the fastest first"""


def estimate(hardware: Hardware) -> Estimate:
    """Estimate every drafter at every batch size."""
    target = []
    for batch_size in hardware.batch_sizes:
        plain_s = target_s(hardware, batch_size, 1)
        target.append(
            TargetEstimate(
                batch_size=batch_size,
                estimated_forward_ms=1000 * plain_s,
                estimated_plain_tokens_per_s=1 / plain_s,
            )
        )
    drafters = [
        _drafter(hardware, drafter, batch_size)
        for batch_size in hardware.batch_sizes
        for drafter in hardware.drafters
    ]
    drafters.sort(key=lambda row: (row.batch_size, -row.best.estimated_speedup))
    return Estimate(
        provenance=CodeProvenance(**code(("specdec",))),
        parameters=hardware.model_dump(mode="json"),
        assumptions=assumptions(hardware),
        target=target,
        drafters=drafters,
    )


def forward_s(
    model: Model,
    device: Device,
    share: float,
    hardware: Hardware,
    batch_size: int,
    new_tokens: int,
) -> float:
    """Seconds of a share of a forward on one device: its memory traffic or its arithmetic.

    Weights are read once, however many rows there are; `new_tokens` are those of a row.
    """
    weights = model.parameters_b * 1e9
    moved = weights * model.bits / 8 + batch_size * hardware.context * model.kv_bytes_per_token
    multiplied = 2 * weights * batch_size * new_tokens
    memory_s = moved / (device.bandwidth_tb_s * 1e12 * hardware.efficiency.bandwidth)
    compute_s = multiplied / (device.compute_tflops * 1e12 * hardware.efficiency.compute)
    return share * max(memory_s, compute_s)


def target_s(hardware: Hardware, batch_size: int, new_tokens: int) -> float:
    """Seconds of a target forward over all its devices, with what they send each other."""
    target = hardware.target
    parts = [
        forward_s(target, device, share, hardware, batch_size, new_tokens)
        for device, share in zip(hardware.devices, hardware.shares, strict=True)
    ]
    state = batch_size * new_tokens * target.hidden_size * STATE_BYTES
    hop = hardware.link.latency_us / 1e6 + state / (hardware.link.bandwidth_gb_s * 1e9)
    others = len(parts) - 1
    if hardware.split == "pipeline":
        seconds = sum(parts) + others * hop
    else:
        # A ring of all devices, twice a layer: behind the attention and behind the MLP.
        seconds = max(parts) + 2 * target.num_layers * others * hop
    return seconds + target.overhead_us / 1e6


def draft_s(hardware: Hardware, drafter: DraftModel, batch_size: int) -> float:
    """Seconds of one forward of a draft model, one token a row."""
    device = next(d for d in hardware.devices if d.name == drafter.device)
    seconds = forward_s(drafter, device, 1.0, hardware, batch_size, 1)
    return seconds + drafter.overhead_us / 1e6


def expected_tokens(conditional: Sequence[float]) -> float:
    """Tokens that a step emits: its own, and those accepted.

    With one alpha for all depths this is (1 - alpha^(g+1)) / (1 - alpha).
    """
    return 1 + sum(prod(conditional[:depth]) for depth in range(1, len(conditional) + 1))


def _drafter(hardware: Hardware, drafter: DraftModel, batch_size: int) -> DrafterEstimate:
    one_s = draft_s(hardware, drafter, batch_size)
    plain_s = target_s(hardware, batch_size, 1)
    conditional = drafter.alphas(hardware.max_draft_tokens)
    lengths = []
    for length in range(hardware.max_draft_tokens + 1):
        # Without a draft the draft model does not run, and this is plain decoding.
        step_s = length * one_s + target_s(hardware, batch_size, length + 1)
        tokens = expected_tokens(conditional[:length])
        lengths.append(
            LengthEstimate(
                num_draft_tokens=length,
                estimated_tau=tokens,
                estimated_step_ms=1000 * step_s,
                estimated_speedup=tokens * plain_s / step_s,
                estimated_tokens_per_s=tokens / step_s,
            )
        )
    return DrafterEstimate(
        name=drafter.name,
        batch_size=batch_size,
        alpha=drafter.alpha,
        estimated_draft_forward_ms=1000 * one_s,
        best=max(lengths, key=lambda row: row.estimated_speedup),
        lengths=lengths,
    )


def assumptions(hardware: Hardware) -> list[str]:
    """Everything that the estimate takes for granted, in words."""
    efficiency, link = hardware.efficiency, hardware.link
    pairs = list(zip(hardware.devices, hardware.shares, strict=True))
    shares = ", ".join(f"{device.name} {share:.0%}" for device, share in pairs)
    how = "one after the other, times add" if hardware.split == "pipeline" else "slowest decides"
    found = [
        "an estimate from stated parameters: nothing was measured, and no interval is given",
        f"a forward takes the longer of reading weights and cache at {efficiency.bandwidth:.0%} of "
        f"the bandwidth and multiplying at {efficiency.compute:.0%} of the compute",
        f"the target is split by {hardware.split} ({how}): {shares}",
        f"a transfer between devices takes {link.latency_us:g} us and its bytes at "
        f"{link.bandwidth_gb_s:g} GB/s; states are {STATE_BYTES} bytes a number",
        f"every row has {hardware.context} tokens cached; attention's own arithmetic is left out",
        "drafts are chains; each depth's alpha is given, and does not depend on what came before",
        "a draft model reads one token a forward; verifying, sampling and the loop's own work cost "
        "no more than the stated overhead_us",
    ]
    models = (hardware.target, *hardware.drafters)
    bare = [model.name for model in models if hardware.context and not model.kv_bytes_per_token]
    if bare:
        found.append(f"keys and values of {', '.join(bare)} are left out: kv_bytes_per_token is 0")
    for device, share in pairs:
        found += _what_does_not_fit(hardware, device, share)
    return found


def _what_does_not_fit(hardware: Hardware, device: Device, share: float) -> list[str]:
    rows = max(hardware.batch_sizes)
    part = share * hardware.target.memory_gb(rows, hardware.context)
    needed = {"": part}
    for drafter in hardware.drafters:
        if drafter.device == device.name:
            beside = drafter.memory_gb(rows, hardware.context)
            needed[f" with the drafter {drafter.name}"] = part + beside
    return [
        f"DOES NOT FIT: {device.name} holds {device.memory_gb:g} GB but its share of the "
        f"target{company} takes {size:.1f} GB at batch {rows}; the estimate stands for a device "
        "that holds it"
        for company, size in needed.items()
        if device.memory_gb is not None and size > device.memory_gb
    ]
