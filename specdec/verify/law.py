"""The exact law of a verdict: the randomness of a rule integrated out, from the outside.

A rule of this package compares each node's uniform with one number and draws one token from one
distribution. Both can be read off any implementation by bisection on the randomness it is given, to
the last bit and without knowing how it works. Exponential in the number of nodes: for small drafts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from specdec.verify.draft import Draft, Verdict

# Called like `specdec.verify.verify`: (target_probs, draft, *, uniforms, noise) -> Verdict.
Engine = Callable[..., Verdict]

_BITS = 53  # of a float64 in [0, 1)
_LARGEST = 1.0 - 2.0**-_BITS
_REJECTED_NOISE = 1e30


@dataclass(frozen=True, eq=False)
class VerdictLaw:
    """What a rule does with each draft row, over all its randomness.

    Attributes:
        thresholds: [B, N] float64, node i is accepted iff its uniform is below; NaN for a node that
            never decides anything.
        spread: [B, N] float64, how far the thresholds of one node lie apart between contexts; 0 for
            a rule that judges each node by one number.
        paths: [B, K, D] accepted nodes of each of the K outcomes, -1 padded; outcomes may repeat.
        probs: [B, K] float64 probability of the outcome.
        last_probs: [B, K, V] float64 distribution of the last token given the outcome.
    """

    thresholds: Tensor
    spread: Tensor
    paths: Tensor
    probs: Tensor
    last_probs: Tensor


def verdict_law(engine: Engine, target_probs: Tensor, draft: Draft) -> VerdictLaw:
    """Integrate out the uniforms and the noise of `engine` for every row of a small draft."""
    thresholds, spread = _find_thresholds(engine, target_probs, draft)
    accept = _patterns(draft.num_nodes)  # [K, N]
    cut = thresholds.nan_to_num(0.5).unsqueeze(1)  # [B, 1, N]
    uniforms = torch.where(accept, cut / 2, (cut + 1) / 2).clamp(max=_LARGEST)
    probs = torch.where(accept, cut, 1 - cut).prod(2)
    last_probs, paths = _find_last_probs(engine, target_probs, draft, uniforms)
    return VerdictLaw(thresholds, spread, paths, probs, last_probs)


def repeat_rows(draft: Draft, times: int) -> Draft:
    """Repeat every row of a draft `times` times, the copies of one row next to each other."""
    tokens, lengths = draft.tokens, draft.lengths
    return Draft(
        tokens.repeat_interleave(times, 0),
        lengths.repeat_interleave(times, 0),
        None if draft.parents is None else draft.parents.repeat_interleave(times, 0),
        None if draft.probs is None else draft.probs.repeat_interleave(times, 0),
        draft.depth,
    )


def _patterns(num_nodes: int) -> Tensor:
    """List all accept / reject decisions, bool [2 ** N, N]."""
    return torch.tensor(list(product((True, False), repeat=num_nodes))).view(-1, num_nodes)


def _find_thresholds(engine: Engine, target_probs: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """Bisect each node's uniform in every context of the others' extremes: two [B, N]."""
    batch_size, num_nodes = draft.tokens.shape
    if num_nodes == 0:
        return torch.empty(batch_size, 0).double(), torch.empty(batch_size, 0).double()
    contexts = _patterns(num_nodes).double() * _LARGEST  # [K, N], float64 throughout
    num_contexts = contexts.shape[0]
    rows = num_nodes * num_contexts
    repeated = repeat_rows(draft, rows)
    target = target_probs.repeat_interleave(rows, 0)
    base = contexts.repeat(batch_size * num_nodes, 1)  # [B * N * K, N]
    column = torch.arange(num_nodes).repeat_interleave(num_contexts).repeat(batch_size).unsqueeze(1)
    noise = torch.ones(batch_size * rows, target_probs.shape[2], dtype=torch.float64)

    def path_at(value: Tensor) -> Tensor:
        uniforms = base.scatter(1, column, value.unsqueeze(1))
        return engine(target, repeated, uniforms=uniforms, noise=noise).path

    low = torch.zeros(batch_size * rows, dtype=torch.float64)
    high = torch.full_like(low, _LARGEST)
    accepted, rejected = path_at(low), path_at(high)
    decides = (accepted != rejected).any(1)
    for _ in range(_BITS):
        middle = (low + high) / 2
        below = (path_at(middle) == accepted).all(1)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # A node that accepts even the largest uniform in every context is certain: see below.
    found = torch.where(decides, high, torch.nan).view(batch_size, num_nodes, num_contexts)
    thresholds = found.nanmean(2)
    top = found.nan_to_num(-1.0).amax(2)
    spread = (top - found.nan_to_num(2.0).amin(2)).where(~thresholds.isnan(), 0.0)
    return torch.where(thresholds.isnan(), thresholds, top), spread


def _find_last_probs(
    engine: Engine, target_probs: Tensor, draft: Draft, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Bisect the noise of each token against the likeliest one: [B, K, V], and paths [B, K, D]."""
    batch_size, num_patterns, _ = uniforms.shape
    vocab_size = target_probs.shape[2]

    def run(copies: int, noise: Tensor) -> Verdict:
        return engine(
            target_probs.repeat_interleave(num_patterns * copies, 0),
            repeat_rows(draft, num_patterns * copies),
            uniforms=uniforms.flatten(0, 1).repeat_interleave(copies, 0),
            noise=noise,
        )

    def last_token(verdict: Verdict) -> Tensor:
        return verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)

    flat = batch_size * num_patterns
    plain = run(1, torch.ones(flat, vocab_size, dtype=torch.float64))
    likeliest = last_token(plain).repeat_interleave(vocab_size).unsqueeze(1)  # [B * K * V, 1]
    tokens = torch.arange(vocab_size).repeat(flat)
    noise = torch.full((flat * vocab_size, vocab_size), _REJECTED_NOISE, dtype=torch.float64)
    noise.scatter_(1, likeliest, 1.0)
    low = torch.zeros(flat * vocab_size, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BITS):
        middle = (low + high) / 2
        wins = last_token(run(vocab_size, noise.scatter(1, tokens[:, None], middle[:, None])))
        below = wins == tokens
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    ratio = torch.where(likeliest.squeeze(1) == tokens, 1.0, low).view(flat, vocab_size)
    last_probs = (ratio / ratio.sum(1, keepdim=True)).view(batch_size, num_patterns, vocab_size)
    return last_probs, plain.path.view(batch_size, num_patterns, -1)
