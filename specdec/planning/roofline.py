"""Estimates for hardware that is not here: a roofline of stated parameters, nothing measured.

Source: Williams et al. 2009, doi 10.1145/1498765.1498785; expected tokens: Leviathan et al. 2022,
arXiv 2211.17192, section 3.1.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from specdec.bench.results import Record, Results
from specdec.common.config import Config, load_config
from specdec.common.provenance import CodeProvenance, code

Reached = Annotated[float, Field(gt=0, le=1)]
STATE_BYTES = 2  # of a number that goes from device to device


def _check_alpha(given: Any) -> Any:
    # A union's own errors would name both types.
    values = given if isinstance(given, list) else [given]
    if not values or not all(type(v) in (int, float) and 0 <= v <= 1 for v in values):
        raise ValueError("must be a number in [0, 1], or a list of them, one a depth")
    return given


class Device(Config):
    """A device.

    Attributes:
        name: for drafters to say where they run.
        bandwidth_tb_s: bandwidth of its memory.
        compute_tflops: dense compute, in the type that is multiplied in.
        memory_gb: None if it does not matter.
        share: part of the target's layers or, split by tensors, of each layer; None for a share in
            proportion to the bandwidth. Either all devices state one or none does.
    """

    name: str = ""
    bandwidth_tb_s: PositiveFloat
    compute_tflops: PositiveFloat
    memory_gb: NonNegativeFloat | None = None
    share: NonNegativeFloat | None = None


class Link(Config):
    """The link that joins the devices; one of its transfers follows the other."""

    bandwidth_gb_s: PositiveFloat = 32.0
    latency_us: NonNegativeFloat = 10.0


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
    parameters_b: PositiveFloat
    bits: PositiveFloat = 16.0
    kv_bytes_per_token: NonNegativeFloat = 0.0
    num_layers: PositiveInt = 1
    hidden_size: NonNegativeInt = 0
    overhead_us: NonNegativeFloat = 0.0

    def memory_gb(self, rows: int, context: int) -> float:
        return self.parameters_b * self.bits / 8 + rows * context * self.kv_bytes_per_token / 1e9


class DraftModel(Model):
    """A draft model, whole on one device.

    Attributes:
        alpha: probability that a drafted token is accepted, one number for all depths or the
            conditional one of each depth, the last of which holds behind the list's end.
    """

    device: str = ""
    alpha: Annotated[float | list[float], BeforeValidator(_check_alpha)]


class Hardware(Config):
    """The inputs of a roofline estimate.

    Attributes:
        split: "pipeline" puts the target's layers one after the other, so that times add; "tensor"
            divides every layer, so that the slowest device decides.
        context: tokens cached in every row.
        max_draft_tokens: longest chain that is tried.
    """

    target: Model
    devices: list[Device] = Field(min_length=1)
    drafters: list[DraftModel] = Field(min_length=1)
    link: Link = Link()
    efficiency: Efficiency = Efficiency()
    split: Literal["pipeline", "tensor"] = "pipeline"
    context: NonNegativeInt = 2048
    batch_sizes: list[PositiveInt] = Field(default_factory=lambda: [1], min_length=1)
    max_draft_tokens: PositiveInt = 12

    @model_validator(mode="after")
    def _check(self) -> Self:
        names, shares = ([getattr(d, key) for d in self.devices] for key in ("name", "share"))
        stated = [share for share in shares if share is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"devices: the names {names} must differ")
        if stated and (len(stated) < len(shares) or abs(sum(stated) - 1) > 1e-3):
            raise ValueError(f"devices: the shares {shares} must sum to 1, or be left out of all")
        for index, drafter in enumerate(self.drafters):
            if drafter.device not in names:
                place, known = f"drafters.{index}.device", ", ".join(names)
                raise ValueError(f"{place} is {drafter.device!r} but must be one of {known}")
        # Between devices states travel: what is left out would cost nothing.
        if len(names) > 1 and not self.target.hidden_size:
            raise ValueError("target.hidden_size is 0 but must be above 0; state it")
        if len(names) > 1 and self.split == "tensor" and self.target.num_layers < 2:
            raise ValueError("target.num_layers is 1 but must be at least 2 for a tensor split")
        return self

    def shares(self, model: Model) -> list[tuple[Device, float]]:
        """The devices that hold a model, and the part of it on each."""
        if isinstance(model, DraftModel):
            return [(device, 1.0) for device in self.devices if device.name == model.device]
        total = sum(device.bandwidth_tb_s for device in self.devices)
        even = ((device, device.bandwidth_tb_s / total) for device in self.devices)
        return [(device, part if device.share is None else device.share) for device, part in even]

    def forward_s(self, model: Model, batch_size: int, new_tokens: Any) -> Any:
        """Seconds of a forward over all devices of a model, with what they send each other.

        On each device it is memory traffic or arithmetic. Weights are read once, however many rows
        there are; `new_tokens`, a number or an array of them, are those of a row.
        """
        weights, parts = model.parameters_b * 1e9, []
        moved = weights * model.bits / 8 + batch_size * self.context * model.kv_bytes_per_token
        multiplied = 2 * weights * batch_size * new_tokens
        for device, share in self.shares(model):
            memory_s = moved / (device.bandwidth_tb_s * 1e12 * self.efficiency.bandwidth)
            compute_s = multiplied / (device.compute_tflops * 1e12 * self.efficiency.compute)
            parts.append(share * np.maximum(memory_s, compute_s))
        state = batch_size * new_tokens * model.hidden_size * STATE_BYTES
        hop = self.link.latency_us / 1e6 + state / (self.link.bandwidth_gb_s * 1e9)
        others = len(parts) - 1
        # A ring of all devices, twice a layer: behind the attention and behind the MLP.
        tensor_s = np.max(parts, 0) + 2 * model.num_layers * others * hop
        seconds = np.sum(parts, 0) + others * hop if self.split == "pipeline" else tensor_s
        return seconds + model.overhead_us / 1e6


def load_hardware(path: str, overrides: Sequence[str] = ()) -> Hardware:
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
    sizes = hardware.batch_sizes
    plain = [(size, float(hardware.forward_s(hardware.target, size, 1))) for size in sizes]
    drafters = [_drafter(hardware, *pair) for pair in product(hardware.drafters, sizes)]
    return Estimate(
        provenance=CodeProvenance(**code(("specdec",))),
        parameters=hardware.model_dump(mode="json"),
        assumptions=_assumptions(hardware),
        target=[
            TargetEstimate(
                batch_size=size,
                estimated_forward_ms=1000 * plain_s,
                estimated_plain_tokens_per_s=1 / plain_s,
            )
            for size, plain_s in plain
        ],
        drafters=sorted(drafters, key=lambda row: (row.batch_size, -row.best.estimated_speedup)),
    )


def expected_tokens(alpha: float | Sequence[float], longest: int) -> np.ndarray:
    """Tokens that steps emit, their own and those accepted, for drafts of 0, 1, ... tokens.

    With one alpha for all depths this is (1 - alpha^(g+1)) / (1 - alpha).
    """
    given = np.atleast_1d(alpha)
    conditional = given[np.minimum(np.arange(longest), len(given) - 1)]
    return np.cumsum([1.0, *np.cumprod(conditional)])


def _drafter(hardware: Hardware, drafter: DraftModel, batch_size: int) -> DrafterEstimate:
    draft_s = float(hardware.forward_s(drafter, batch_size, 1))
    counts = np.arange(hardware.max_draft_tokens + 1)
    # Without a draft the draft model does not run, and this is plain decoding.
    step_s = counts * draft_s + hardware.forward_s(hardware.target, batch_size, counts + 1)
    tokens = expected_tokens(drafter.alpha, hardware.max_draft_tokens)
    columns = {
        "num_draft_tokens": counts,
        "estimated_tau": tokens,
        "estimated_step_ms": 1000 * step_s,
        "estimated_speedup": tokens * step_s[0] / step_s,
        "estimated_tokens_per_s": tokens / step_s,
    }
    rows = zip(*columns.values(), strict=True)
    lengths = [LengthEstimate(**dict(zip(columns, row, strict=True))) for row in rows]
    return DrafterEstimate(
        name=drafter.name,
        batch_size=batch_size,
        alpha=drafter.alpha,
        estimated_draft_forward_ms=1000 * draft_s,
        best=max(lengths, key=lambda row: row.estimated_speedup),
        lengths=lengths,
    )


def _assumptions(hardware: Hardware) -> list[str]:
    target, efficiency, link = hardware.target, hardware.efficiency, hardware.link
    pairs, context = hardware.shares(target), hardware.context
    shares = ", ".join(f"{device.name} {share:.0%}" for device, share in pairs)
    how = "one after the other, times add" if hardware.split == "pipeline" else "slowest decides"
    found = [
        "an estimate from stated parameters: nothing was measured, and no interval is given",
        f"a forward takes the longer of reading weights and cache at {efficiency.bandwidth:.0%} of "
        f"the bandwidth and multiplying at {efficiency.compute:.0%} of the compute",
        f"the target is split by {hardware.split} ({how}): {shares}",
        f"a transfer between devices takes {link.latency_us:g} us and its bytes at "
        f"{link.bandwidth_gb_s:g} GB/s; states are {STATE_BYTES} bytes a number",
        f"every row has {context} tokens cached; attention's own arithmetic is left out",
        "drafts are chains; each depth's alpha is given, and does not depend on what came before",
        "a draft model reads one token a forward; verifying, sampling and the loop's own work cost "
        "no more than the stated overhead_us",
    ]
    models = (target, *hardware.drafters)
    bare = [model.name for model in models if context and not model.kv_bytes_per_token]
    if bare:
        found.append(f"keys and values of {', '.join(bare)} are left out: kv_bytes_per_token is 0")
    rows = max(hardware.batch_sizes)
    for device, share in pairs:
        needed = {"": share * target.memory_gb(rows, context)}
        for each in (drafter for drafter in hardware.drafters if drafter.device == device.name):
            needed[f" with the drafter {each.name}"] = needed[""] + each.memory_gb(rows, context)
        found += [
            f"DOES NOT FIT: {device.name} holds {device.memory_gb:g} GB but its share of the "
            f"target{company} takes {size:.1f} GB at batch {rows}; the estimate stands for a "
            "device that holds it"
            for company, size in needed.items()
            if device.memory_gb is not None and size > device.memory_gb
        ]
    return found
