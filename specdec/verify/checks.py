"""Refuse bad input by name, row and value, before it becomes a wrong token.

Source of the contract: a `ValueError` names the argument, the row, the value and the rule; a
`TypeError` is raised for nothing but a wrong dtype or no tensor at all.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    draft: Draft,
    rule: str,
    batch_size: int,
    vocab_size: int,
    device: torch.device,
    target_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
    noise: Tensor | None = None,
    bonus_tokens: Tensor | None = None,
    greedy: Tensor | None = None,
) -> None:
    """Check what is known without a host synchronization: kinds, shapes, dtypes and devices."""
    if not isinstance(draft, Draft):
        raise TypeError(f"it is a {type(draft).__name__} but must be a Draft")
    if type(draft.depth) is not int or draft.depth < 0:
        raise ValueError(f"depth is {draft.depth!r} but must be an int >= 0 (rule {rule!r})")
    num_nodes = draft.tokens.shape[-1] if getattr(draft.tokens, "ndim", 0) else 0
    by_node, floats, ids = (batch_size, num_nodes), tuple(SUM_TOLERANCE), (torch.int64,)
    expected: list[tuple[str, Any, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("tokens", draft.tokens, by_node, ids),
        ("lengths", draft.lengths, (batch_size,), ids),
        ("parents", draft.parents, by_node, ids),
        ("probs", draft.probs, (*by_node, vocab_size), floats),
        ("confidence", draft.confidence, by_node, floats),
        ("target_probs", target_probs, (batch_size, num_nodes + 1, vocab_size), floats),
        ("uniforms", uniforms, by_node, floats),
        ("noise", noise, (batch_size, vocab_size), floats),
        ("bonus_tokens", bonus_tokens, (batch_size,), ids),
        ("greedy", greedy, (batch_size,), (torch.bool,)),
    ]
    for name, tensor, shape, dtypes in expected:
        if tensor is None and name not in ("tokens", "lengths"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__} but must be a tensor")
        if tensor.shape != shape:
            has = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {has} but rule {rule!r} needs {shape} here")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(map(str, dtypes))
            raise TypeError(f"{name} is {tensor.dtype} but rule {rule!r} needs one of {allowed}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but rule {rule!r} works on {device}")
    if bonus_tokens is not None and draft.parents is not None:
        must = "a tree has a row behind each leaf: give a chain (parents=None), or no bonus_tokens"
        raise ValueError(f"bonus_tokens: {must} (rule {rule!r})")


def draft_faults(draft: Draft, vocab_size: int, supports_trees: bool = True) -> Iterator[Fault]:
    """List every way in which a draft can be wrong, without a host synchronization.

    No mask needs an earlier one to be clear: none of them indexes with what may be out of range.
    """
    num_nodes, tokens, lengths = draft.num_nodes, draft.tokens, draft.lengths
    outside = (lengths < 0) | (lengths > num_nodes)
    yield "lengths", outside, lengths, f"a row has 0 to {num_nodes} nodes"
    real = draft.real_nodes()
    odd = real & ((tokens < 0) | (tokens >= vocab_size))
    yield "tokens", odd, tokens, f"token ids are 0 to {vocab_size - 1}"
    if draft.parents is None:
        yield "lengths", lengths > draft.depth, lengths, f"depth is only {draft.depth}"
    else:
        parents, nodes = draft.parents, torch.arange(num_nodes, device=real.device)
        wrong = real & ((parents < -1) | (parents >= nodes))
        yield "parents", wrong, parents, "a parent is -1 or the index of an earlier node"
        upward = ancestors(parents.masked_fill(~real | wrong, -1), draft.depth + 1)
        too_deep = real & (upward[:, :, draft.depth] >= 0)
        yield "parents", too_deep, parents, f"depth is only {draft.depth}"
        if not supports_trees:
            yield "parents", real & (parents != nodes - 1), parents, "the rule judges chains only"
    if draft.probs is not None and num_nodes:
        yield from _distribution_faults("probs", draft.probs, real)
        own = draft.probs.gather(2, tokens.masked_fill(~real | odd, 0).unsqueeze(2)).squeeze(2)
        yield "probs", real & ~(own > 0), own, "a drawn token has a positive probability"


def randomness_faults(
    draft: Draft,
    target_probs: Tensor,
    uniforms: Tensor | None,
    noise: Tensor | None,
    needs_uniforms: bool,
    bonus_tokens: Tensor | None = None,
    greedy: Tensor | None = None,
) -> Iterator[Fault]:
    """List what is wrong with the target's rows and with the randomness that they need."""
    real = draft.real_nodes()
    rows = pad(real, (1, 0), value=True)
    if bonus_tokens is not None:  # the row behind the last node is not read
        rows = pad(real, (0, 1), value=False)
        last = target_probs.shape[2] - 1
        outside = (bonus_tokens < 0) | (bonus_tokens > last)
        yield "bonus_tokens", outside, bonus_tokens, f"token ids are 0 to {last}"
    if greedy is not None:
        highest, is_cold = target_probs.amax(2), greedy.unsqueeze(1)
        odd = rows & is_cold & ~highest.isfinite()
        yield "target_probs", odd, highest, "the largest entry of a greedy row is finite"
        rows = rows & ~is_cold
    yield from _distribution_faults("target_probs", target_probs, rows)
    missing = ["uniforms"] if uniforms is None and needs_uniforms and draft.num_nodes else []
    for name in missing + (["noise"] if noise is None else []):
        support = (target_probs > 0).sum(2)
        must = "may be None only where every row is greedy or has one possible token"
        yield name, rows & (support != 1), support, must
    if uniforms is not None:
        outside = real & ~((uniforms >= 0) & (uniforms < 1))
        yield "uniforms", outside, uniforms, "numbers are in [0, 1)"
    if noise is not None:
        yield "noise", ~(noise >= 0), noise, "numbers are not negative or NaN"


def _distribution_faults(name: str, probs: Tensor, real: Tensor) -> Iterator[Fault]:
    """Find `real` rows of [B, R, V] that are no distributions; NaN fails the comparisons."""
    lowest = probs.amin(2)
    yield name, real & ~(lowest >= 0), lowest, "probabilities are not negative or NaN"
    total = probs.sum(2, dtype=torch.promote_types(probs.dtype, torch.float32))
    tolerance = SUM_TOLERANCE[probs.dtype]
    off = ~((total - 1).abs() <= tolerance)
    yield name, real & off, total, f"rows sum to one within {tolerance:g}"


def refuse(faults: Iterable[Fault], rule: str) -> None:
    """Raise for the first true entry of the first mask that has one; costs synchronizations."""
    for name, bad, values, must in faults:
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            where = f"row {index[0]}" + (f", entry {index[1]}" if len(index) > 1 else "")
            value = f"{values[index].item():g}"
            raise ValueError(f"{name}: {where} has {value}, but {must} (rule {rule!r})")
