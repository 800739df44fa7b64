"""Estimates for hardware that is not here: a roofline of stated parameters, nothing measured.

Source: Williams et al. 2009, doi 10.1145/1498765.1498785; expected tokens: Leviathan et al. 2022,
arXiv 2211.17192, section 3.1.
"""

from dataclasses import asdict
from math import prod
from typing import Any

from specdec.planning.hardware import Device, DraftModel, Hardware, Model, alphas
from specdec.provenance import code

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
