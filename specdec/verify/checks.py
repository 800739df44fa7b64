"""Refuse bad input by name, row and value, before it becomes a wrong token.

Source of the contract: a `ValueError` names the argument, the row, the value and the rule; a
`TypeError` is raised for nothing but a wrong dtype.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from specdec.verify.draft import Draft
from specdec.verify.tree import ancestors

# What is wrong where: the argument, a mask whose first dimension is the row, the values, the rule.
Fault = tuple[str, Tensor, Tensor, str]

# How far a row's sum may be from one. Rounding the entries to 16 bits moves the sums of flat rows
# over 128,000 tokens by up to 0.5 %; float64 rows are often float32 softmaxes cast up.
SUM_TOLERANCE = {
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-5,
}


def check_shapes(
    target_probs: Tensor, draft: Draft, rule: str, uniforms: Tensor | None, noise: Tensor | None
) -> None:
    """Check what is known without a host synchronization: shapes, dtypes and devices."""
    if target_probs.dim() != 3 or draft.tokens.dim() != 2:
        raise ValueError(
            f"target_probs has shape {tuple(target_probs.shape)} and tokens "
            f"{tuple(draft.tokens.shape)}: rule {rule!r} needs [B, N + 1, V] and [B, N]"
        )
    batch_size, num_nodes = draft.tokens.shape
    vocab_size = target_probs.shape[2]
    if vocab_size == 0:
        raise ValueError(f"target_probs has an empty vocabulary (rule {rule!r})")
    floats, ids = tuple(SUM_TOLERANCE), (torch.int64,)
    expected: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("target_probs", target_probs, (batch_size, num_nodes + 1, vocab_size), floats),
        ("tokens", draft.tokens, (batch_size, num_nodes), ids),
        ("lengths", draft.lengths, (batch_size,), ids),
        ("parents", draft.parents, (batch_size, num_nodes), ids),
        ("probs", draft.probs, (batch_size, num_nodes, vocab_size), floats),
        ("confidence", draft.confidence, (batch_size, num_nodes), floats),
        ("uniforms", uniforms, (batch_size, num_nodes), floats),
        ("noise", noise, (batch_size, vocab_size), floats),
    ]
    for name, tensor, shape, dtypes in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but rule {rule!r} needs {shape} here"
            )
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{name} is {tensor.dtype} but rule {rule!r} needs one of {allowed}")
        if tensor.device != target_probs.device:
            raise ValueError(
                f"{name} is on {tensor.device} but target_probs on {target_probs.device}: "
                f"rule {rule!r} needs one device"
            )
    if draft.depth < 0:
        raise ValueError(f"depth is {draft.depth} but must be at least 0 (rule {rule!r})")


def check_draft(
    draft: object, batch_size: int, vocab_size: int, device: torch.device, rule: str
) -> None:
    """Check all that a draft for so many rows can be asked without a host synchronization."""
    if not isinstance(draft, Draft):
        raise TypeError(f"it is a {type(draft).__name__} but must be a Draft")
    for name in ("tokens", "lengths", "parents", "probs", "confidence"):
        value = getattr(draft, name)
        if not isinstance(value, Tensor) and (value is not None or name in ("tokens", "lengths")):
            raise TypeError(f"{name} is a {type(value).__name__} but must be a tensor")
    if draft.tokens.dim() != 2 or len(draft.tokens) != batch_size:
        shape = tuple(draft.tokens.shape)
        raise ValueError(f"tokens has shape {shape} but must be [{batch_size}, N]")
    if type(draft.depth) is not int:
        raise TypeError(f"depth is {draft.depth!r} but must be an int")
    shape = (batch_size, draft.num_nodes + 1, vocab_size)
    check_shapes(torch.empty(1, device=device).expand(shape), draft, rule, None, None)


def check_values(
    target_probs: Tensor,
    draft: Draft,
    rule: str,
    uniforms: Tensor | None,
    noise: Tensor | None,
    needs_uniforms: bool = True,
) -> None:
    """Check every value that a rule reads; costs host synchronizations."""
    refuse(draft_faults(draft, target_probs.shape[2]), rule)
    real = draft.real_nodes()
    real_rows = torch.nn.functional.pad(real, (1, 0), value=True)
    refuse(_distribution_faults("target_probs", target_probs, real_rows), rule)
    _check_randomness(target_probs, real, rule, uniforms, noise, needs_uniforms)


def draft_faults(draft: Draft, vocab_size: int) -> Iterator[Fault]:
    """List every way in which a draft can be wrong, without a host synchronization.

    No mask needs an earlier one to be clear: none of them indexes with what may be out of range.
    """
    num_nodes, tokens, lengths = draft.num_nodes, draft.tokens, draft.lengths
    yield (
        "lengths",
        (lengths < 0) | (lengths > num_nodes),
        lengths,
        f"a row has 0 to {num_nodes} nodes",
    )
    real = draft.real_nodes()
    odd = real & ((tokens < 0) | (tokens >= vocab_size))
    yield "tokens", odd, tokens, f"token ids are 0 to {vocab_size - 1}"
    if draft.parents is None:
        yield "lengths", lengths > draft.depth, lengths, f"depth is only {draft.depth}"
    else:
        yield from _tree_faults(draft.parents, real, draft.depth)
    if draft.probs is not None and num_nodes:
        yield from _distribution_faults("probs", draft.probs, real)
        own = draft.probs.gather(2, tokens.masked_fill(~real | odd, 0).unsqueeze(2)).squeeze(2)
        yield "probs", real & ~(own > 0), own, "a drawn token has a positive probability"


def check_unbranched(draft: Draft, rule: str) -> None:
    """Check that `parents` spell a chain, for rules that know nothing else."""
    if draft.parents is None:
        return
    steps = torch.arange(draft.num_nodes, device=draft.parents.device) - 1
    branching = draft.real_nodes() & (draft.parents != steps)
    refuse([("parents", branching, draft.parents, "the rule judges chains only")], rule)


def _tree_faults(parents: Tensor, real: Tensor, depth: int) -> Iterator[Fault]:
    nodes = torch.arange(parents.shape[1], device=real.device)
    odd = real & ((parents < -1) | (parents >= nodes))
    yield "parents", odd, parents, "a parent is -1 or the index of an earlier node"
    climbed = ancestors(parents.masked_fill(~real | odd, -1), depth + 1)[:, :, depth]
    yield "parents", real & (climbed >= 0), parents, f"depth is only {depth}"


def _distribution_faults(name: str, probs: Tensor, real: Tensor) -> Iterator[Fault]:
    """Find `real` rows of [B, R, V] that are no distributions; NaN fails the comparisons."""
    lowest = probs.amin(2)
    yield name, real & ~(lowest >= 0), lowest, "probabilities are not negative or NaN"
    total = probs.sum(2, dtype=torch.promote_types(probs.dtype, torch.float32))
    tolerance = SUM_TOLERANCE[probs.dtype]
    off = ~((total - 1).abs() <= tolerance)
    yield name, real & off, total, f"rows sum to one within {tolerance:g}"


def _check_randomness(
    target_probs: Tensor,
    real: Tensor,
    rule: str,
    uniforms: Tensor | None,
    noise: Tensor | None,
    needs_uniforms: bool,
) -> None:
    given = {"uniforms": uniforms, "noise": noise}
    missing = [name for name, tensor in given.items() if tensor is None]
    if not needs_uniforms or real.shape[1] == 0:
        missing = [name for name in missing if name != "uniforms"]
    if missing:
        support = (target_probs > 0).sum(2)
        real_rows = torch.nn.functional.pad(real, (1, 0), value=True)
        must = "may be None only where every target row has one possible token"
        refuse([(missing[0], real_rows & (support != 1), support, must)], rule)
    if uniforms is not None:
        outside = real & ~((uniforms >= 0) & (uniforms < 1))
        refuse([("uniforms", outside, uniforms, "numbers are in [0, 1)")], rule)
    if noise is not None:
        refuse([("noise", ~(noise >= 0), noise, "numbers are not negative or NaN")], rule)


def refuse(faults: Iterable[Fault], rule: str) -> None:
    """Raise for the first true entry of the first mask that has one; costs synchronizations."""
    for name, bad, values, must in faults:
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            where = f"row {index[0]}" + (f", entry {index[1]}" if len(index) > 1 else "")
            value = f"{values[index].item():g}"
            raise ValueError(f"{name}: {where} has {value}, but {must} (rule {rule!r})")
