"""Refuse bad input by name, row and value, before it becomes a wrong token.

Source of the contract: a `ValueError` names the argument, the row, the value and the rule; a
`TypeError` is raised for nothing but a wrong dtype.
"""

import torch
from torch import Tensor

from specdec.verify.draft import Draft
from specdec.verify.tree import ancestors

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
    """Check what is known without a host synchronisation: shapes, dtypes and devices."""
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


def check_values(
    target_probs: Tensor,
    draft: Draft,
    rule: str,
    uniforms: Tensor | None,
    noise: Tensor | None,
    needs_uniforms: bool = True,
) -> None:
    """Check every value that a rule reads; costs host synchronisations."""
    num_nodes = draft.num_nodes
    _refuse(
        "lengths",
        (draft.lengths < 0) | (draft.lengths > num_nodes),
        draft.lengths,
        f"a row has 0 to {num_nodes} nodes",
        rule,
    )
    real = draft.real_nodes()
    _refuse(
        "tokens",
        real & ((draft.tokens < 0) | (draft.tokens >= target_probs.shape[2])),
        draft.tokens,
        f"token ids are 0 to {target_probs.shape[2] - 1}",
        rule,
    )
    _check_tree(draft, real, rule)
    real_rows = torch.nn.functional.pad(real, (1, 0), value=True)
    _check_distributions("target_probs", target_probs, real_rows, rule)
    if draft.probs is not None and num_nodes:
        _check_distributions("probs", draft.probs, real, rule)
        own = draft.probs.gather(2, draft.tokens.masked_fill(~real, 0).unsqueeze(2)).squeeze(2)
        _refuse("probs", real & (own <= 0), own, "a drawn token has a positive probability", rule)
    _check_randomness(target_probs, real, rule, uniforms, noise, needs_uniforms)


def check_unbranched(draft: Draft, rule: str) -> None:
    """Check that `parents` spell a chain, for rules that know nothing else."""
    if draft.parents is None:
        return
    steps = torch.arange(draft.num_nodes, device=draft.parents.device) - 1
    branching = draft.real_nodes() & (draft.parents != steps)
    _refuse("parents", branching, draft.parents, "the rule judges chains only", rule)


def _check_tree(draft: Draft, real: Tensor, rule: str) -> None:
    if draft.parents is None:
        too_deep = draft.lengths > draft.depth
        _refuse("lengths", too_deep, draft.lengths, f"depth is only {draft.depth}", rule)
        return
    nodes = torch.arange(draft.num_nodes, device=real.device)
    _refuse(
        "parents",
        real & ((draft.parents < -1) | (draft.parents >= nodes)),
        draft.parents,
        "a parent is -1 or the index of an earlier node",
        rule,
    )
    climbed = ancestors(draft.parents.masked_fill(~real, -1), draft.depth + 1)[:, :, draft.depth]
    too_deep = real & (climbed >= 0)
    _refuse("parents", too_deep, draft.parents, f"depth is only {draft.depth}", rule)


def _check_distributions(name: str, probs: Tensor, real: Tensor, rule: str) -> None:
    """Check that the `real` rows of [B, R, V] are distributions; NaN fails the comparisons."""
    lowest = probs.amin(2)
    _refuse(name, real & ~(lowest >= 0), lowest, "probabilities are not negative or NaN", rule)
    total = probs.sum(2, dtype=torch.promote_types(probs.dtype, torch.float32))
    tolerance = SUM_TOLERANCE[probs.dtype]
    off = ~((total - 1).abs() <= tolerance)
    _refuse(name, real & off, total, f"rows sum to one within {tolerance:g}", rule)


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
        _refuse(
            missing[0],
            real_rows & (support != 1),
            support,
            "may be None only where every target row has one possible token",
            rule,
        )
    if uniforms is not None:
        outside = real & ~((uniforms >= 0) & (uniforms < 1))
        _refuse("uniforms", outside, uniforms, "numbers are in [0, 1)", rule)
    if noise is not None:
        _refuse("noise", ~(noise >= 0), noise, "numbers are not negative or NaN", rule)


def _refuse(name: str, bad: Tensor, values: Tensor, must: str, rule: str) -> None:
    """Raise for the first true entry of `bad`, whose first dimension is the batch row."""
    if not bad.any():
        return
    index = tuple(bad.nonzero()[0].tolist())
    where = f"row {index[0]}" + (f", entry {index[1]}" if len(index) > 1 else "")
    raise ValueError(f"{name}: {where} has {values[index].item():g}, but {must} (rule {rule!r})")
