"""Estimates for hardware that is not here: a roofline of stated parameters, nothing measured.

Source: Williams et al. 2009, doi 10.1145/1498765.1498785; expected tokens: Leviathan et al. 2022,
arXiv 2211.17192, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from specdec.common.config import load_strict, require_at_least
from specdec.common.provenance import code

SPLITS = ("pipeline", "tensor")


@dataclass
class Device:
    """A device.

    Attributes:
        name: for drafters to say where they run.
        bandwidth_tb_s: of its memory, TB/s.
        compute_tflops: dense, in the type that is multiplied in, TFLOP/s.
        memory_gb: GB; None if it does not matter.
        share: of the target's layers or, split by tensors, of each layer; None for a share in
            proportion to the bandwidth. Either all devices state one or none does.
    """

    name: str = ""
    bandwidth_tb_s: float = 0.0
    compute_tflops: float = 0.0
    memory_gb: float | None = None
    share: float | None = None


@dataclass
class Link:
    """What joins the devices; one of its transfers follows the other."""

    bandwidth_gb_s: float = 32.0
    latency_us: float = 10.0


@dataclass
class Efficiency:
    """Shares of the stated bandwidth and compute that a forward reaches."""

    bandwidth: float = 0.7
    compute: float = 0.5


@dataclass
class Model:
    """A language model.

    Attributes:
        name: for the table.
        parameters_b: weights that a forward reads, billions.
        bits: of a weight, scales included.
        kv_bytes_per_token: of keys and values, all layers.
        num_layers: for what a tensor split sends.
        hidden_size: of the state that goes from device to device.
        overhead_us: of a forward beside memory and compute: launches, sampling.
    """

    name: str = "target"
    parameters_b: float = 0.0
    bits: float = 16.0
    kv_bytes_per_token: float = 0.0
    num_layers: int = 1
    hidden_size: int = 0
    overhead_us: float = 0.0


@dataclass
class DraftModel(Model):
    """A draft model, whole on one device.

    Attributes:
        device: name of a device.
        alpha: probability that a drafted token is accepted, one number for all depths or the
            conditional one of each depth.
    """

    device: str = ""
    alpha: Any = None


@dataclass
class Hardware:
    """What a roofline estimate is made from.

    Attributes:
        split: of the target: "pipeline" puts layers one after the other, so that times add;
            "tensor" divides every layer, so that the slowest device decides.
        context: tokens cached in every row.
        batch_sizes: rows.
        max_draft_tokens: longest chain that is tried.
    """

    target: Model = field(default_factory=Model)
    devices: list[Device] = field(
        default_factory=list, metadata={"rule": "a list, each like {name: a, bandwidth_tb_s: 1}"}
    )
    drafters: list[DraftModel] = field(
        default_factory=list, metadata={"rule": "a list, each like {name: 1B, alpha: 0.7}"}
    )
    link: Link = field(default_factory=Link)
    efficiency: Efficiency = field(default_factory=Efficiency)
    split: str = "pipeline"
    context: int = 2048
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    max_draft_tokens: int = 12

    @property
    def shares(self) -> list[float]:
        """Of the target on each device, summing to 1."""
        given = [device.share for device in self.devices]
        if given[0] is not None:
            return [share or 0.0 for share in given]
        total = sum(device.bandwidth_tb_s for device in self.devices)
        return [device.bandwidth_tb_s / total for device in self.devices]


def load_hardware(path: str, overrides: Sequence[str] = ()) -> Hardware:
    """Read stated parameters from YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that does not exist, or a value that cannot be.
    """
    hardware = load_strict(Hardware, path, Path(path), overrides, example="context=4096")
    _check_devices(hardware)
    _check_models(hardware)
    if hardware.split not in SPLITS:
        raise ValueError(f"config split is {hardware.split!r} but must be one of {SPLITS}")
    require_at_least(hardware, 1, "max_draft_tokens")
    require_at_least(hardware, 0, "context")
    require_at_least(hardware.link, 0, "latency_us", prefix="link.")
    _check_positive(hardware.link, "link.", "bandwidth_gb_s")
    for name, value in vars(hardware.efficiency).items():
        _check_share(f"efficiency.{name}", value)
    if not hardware.batch_sizes or min(hardware.batch_sizes) < 1:
        raise ValueError(
            f"config batch_sizes is {hardware.batch_sizes} but must hold numbers of at least 1"
        )
    return hardware


def _check_models(hardware: Hardware) -> None:
    if not hardware.drafters:
        raise ValueError(
            "config drafters is empty but must hold at least one, like {name: 1B, parameters_b: 1, "
            "device: a, alpha: 0.7}"
        )
    models: list[tuple[str, Model]] = [("target.", hardware.target)]
    models += [(f"drafters.{i}.", drafter) for i, drafter in enumerate(hardware.drafters)]
    for prefix, model in models:
        _check_positive(model, prefix, "parameters_b", "bits")
        require_at_least(
            model, 0, "kv_bytes_per_token", "hidden_size", "overhead_us", prefix=prefix
        )
        require_at_least(model, 1, "num_layers", prefix=prefix)
    _check_transfers(hardware)
    known = [device.name for device in hardware.devices]
    for index, drafter in enumerate(hardware.drafters):
        if drafter.device not in known:
            raise ValueError(
                f"config drafters.{index}.device is {drafter.device!r} but must be one of "
                f"{', '.join(known)}"
            )
        for alpha in alphas(drafter, max(1, hardware.max_draft_tokens)):
            if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
                raise ValueError(
                    f"config drafters.{index}.alpha is {drafter.alpha!r} but must be a number in "
                    "[0, 1], or a list of them, one a depth"
                )


def _check_transfers(hardware: Hardware) -> None:
    """Between devices states travel: what is left out would cost nothing."""
    if len(hardware.devices) > 1:
        _check_positive(hardware.target, "target.", "hidden_size")
        if hardware.split == "tensor":
            require_at_least(hardware.target, 2, "num_layers", prefix="target.")


def _check_devices(hardware: Hardware) -> None:
    if not hardware.devices:
        raise ValueError("config devices is empty but must hold at least one")
    for index, device in enumerate(hardware.devices):
        prefix = f"devices.{index}."
        _check_positive(device, prefix, "bandwidth_tb_s", "compute_tflops")
        require_at_least(device, 0, "memory_gb", "share", prefix=prefix)
    names = [device.name for device in hardware.devices]
    if len(set(names)) < len(names):
        raise ValueError(f"config devices: the names {names} must differ")
    shares = [device.share for device in hardware.devices]
    known = [share for share in shares if share is not None]
    if known and (len(known) < len(shares) or abs(sum(known) - 1) > 1e-3):
        raise ValueError(
            f"config devices: the shares {shares} must sum to 1, every device with one, or be left "
            "out of all"
        )


def _check_positive(holder: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(holder, name)
        if not value > 0:
            raise ValueError(f"config {prefix}{name} is {value} but must be above 0; state it")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"config {name} is {value} but must be above 0 and at most 1")


def alphas(drafter: DraftModel, depth: int) -> list[Any]:
    """Conditional acceptance at depths 1 to `depth`; behind a list's end its last one holds."""
    if not isinstance(drafter.alpha, list):
        return [drafter.alpha] * depth
    if not drafter.alpha:
        return [None] * depth
    return [drafter.alpha[min(level, len(drafter.alpha) - 1)] for level in range(depth)]


STATE_BYTES = 2  # of a number that goes from device to device


def estimate(hardware: Hardware) -> dict[str, Any]:
    """Estimate every drafter at every batch size.

    Returns:
        Content of `estimate.json`: times of forwards, and for each drafter and batch size the
        lengths tried and the best one. Every figure's key begins with "estimated".
    """
    rows = [
        _drafter(hardware, drafter, size)
        for size in hardware.batch_sizes
        for drafter in hardware.drafters
    ]
    rows.sort(key=lambda row: (row["batch_size"], -row["best"]["estimated_speedup"]))
    return {
        "schema": "specdec-estimate-1",
        "label": "estimate: nothing here was measured",
        "provenance": code(("specdec",)),
        "parameters": asdict(hardware),
        "assumptions": assumptions(hardware),
        "target": [
            {
                "batch_size": size,
                "estimated_forward_ms": 1000 * target_s(hardware, size, 1),
                "estimated_plain_tokens_per_s": 1 / target_s(hardware, size, 1),
            }
            for size in hardware.batch_sizes
        ],
        "drafters": rows,
    }


def forward_s(
    model: Model, device: Device, share: float, hardware: Hardware, batch_size: int, new_tokens: int
) -> float:
    """Seconds of a share of a forward on one device: its memory traffic or its arithmetic.

    Args:
        model: whose weights and cache are read once, however many rows there are.
        device: where.
        share: of the model.
        hardware: context and efficiency.
        batch_size: rows.
        new_tokens: a row.
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


def expected_tokens(conditional: list[float]) -> float:
    """Tokens that a step emits: its own, and those accepted.

    With one alpha for all depths this is (1 - alpha^(g+1)) / (1 - alpha).
    """
    return 1 + sum(prod(conditional[:depth]) for depth in range(1, len(conditional) + 1))


def _drafter(hardware: Hardware, drafter: DraftModel, batch_size: int) -> dict[str, Any]:
    one_s = draft_s(hardware, drafter, batch_size)
    plain_s = target_s(hardware, batch_size, 1)
    conditional = alphas(drafter, hardware.max_draft_tokens)
    lengths = []
    for length in range(hardware.max_draft_tokens + 1):
        # Without a draft the draft model does not run, and this is plain decoding.
        step_s = length * one_s + target_s(hardware, batch_size, length + 1)
        tokens = expected_tokens(conditional[:length])
        lengths.append(
            {
                "num_draft_tokens": length,
                "estimated_tau": tokens,
                "estimated_step_ms": 1000 * step_s,
                "estimated_speedup": tokens * plain_s / step_s,
                "estimated_tokens_per_s": tokens / step_s,
            }
        )
    return {
        "name": drafter.name,
        "batch_size": batch_size,
        "alpha": drafter.alpha,
        "estimated_draft_forward_ms": 1000 * one_s,
        "best": max(lengths, key=lambda row: row["estimated_speedup"]),
        "lengths": lengths,
    }


def assumptions(hardware: Hardware) -> list[str]:
    """What the estimate takes for granted, in words."""
    efficiency, link = hardware.efficiency, hardware.link
    shares = ", ".join(
        f"{device.name} {share:.0%}"
        for device, share in zip(hardware.devices, hardware.shares, strict=True)
    )
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
    return [*found, *_what_is_left_out(hardware), *_what_does_not_fit(hardware)]


def _what_is_left_out(hardware: Hardware) -> list[str]:
    models = (hardware.target, *hardware.drafters)
    names = [model.name for model in models if hardware.context and not model.kv_bytes_per_token]
    if not names:
        return []
    return [f"keys and values of {', '.join(names)} are left out: kv_bytes_per_token is 0"]


def _what_does_not_fit(hardware: Hardware) -> list[str]:
    found = []
    for device, share in zip(hardware.devices, hardware.shares, strict=True):
        part = share * _memory_gb(hardware, hardware.target)
        needed = {"": part}
        for drafter in hardware.drafters:
            if drafter.device == device.name:
                needed[f" with the drafter {drafter.name}"] = part + _memory_gb(hardware, drafter)
        found += [
            f"DOES NOT FIT: {device.name} holds {device.memory_gb:g} GB but its share of the "
            f"target{company} takes {size:.1f} GB at batch {max(hardware.batch_sizes)}; the "
            "estimate stands for a device that holds it"
            for company, size in needed.items()
            if device.memory_gb is not None and size > device.memory_gb
        ]
    return found


def _memory_gb(hardware: Hardware, model: Model) -> float:
    """Of weights, keys and values at the largest batch."""
    rows = max(hardware.batch_sizes) * hardware.context
    return model.parameters_b * model.bits / 8 + rows * model.kv_bytes_per_token / 1e9
