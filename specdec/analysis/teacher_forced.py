"""A drafter's distributions at every place of texts, against the target's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.analysis.texts import Text
from specdec.engine.interfaces import Target
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.targets.taps import Reading, read_text

Array = np.ndarray[Any, Any]
# Rows are compared in chunks, which bounds the memory of vocabularies.
CHUNK = 128
_DTYPES = {"rank": np.int32, "best_draft": np.int32, "best_target": np.int32, "possible": np.bool_}


@dataclass(frozen=True, eq=False)
class Evidence:
    """One row a text, one column a step that might start there, one level a drafted depth.

    Column s (from 0) is the step that starts with s + 1 tokens done; its depth d (from 0) drafts
    the text's token s + 1 + d (from 0), and the tokens above it on the path are the text's own.
    Everything behind a text's end is 0, see `valid`.

    Attributes:
        num_tokens: [B] int64 new tokens, T.
        max_tokens: [B] int64 that were allowed.
        rank: [B, S, D] int32 of the text's token among the drafter's candidates; V where it cannot
            say it.
        accept: [B, S, D, W] float32 probability that the w-th sibling drawn from the drafter's
            distribution is the accepted one, given the text; at the sampling settings.
        overlap: [B, S, D] float32 sum_x min(p(x), q(x)), at the sampling settings.
        possible: [B, S, D] bool, the target could say the token at these settings.
        target_prob, draft_prob: [B, S, D] float32 of the token, as the models give it: at
            temperature 1, unfiltered. So are all below.
        confidence: [B, S, D] float32 highest probability of the drafter.
        target_entropy, draft_entropy: [B, S, D] float32 nats.
        best_draft, best_target: [B, S, D] int32 likeliest token.
    """

    num_tokens: Array
    max_tokens: Array
    rank: Array
    accept: Array
    overlap: Array
    possible: Array
    target_prob: Array
    draft_prob: Array
    confidence: Array
    target_entropy: Array
    draft_entropy: Array
    best_draft: Array
    best_target: Array

    @property
    def depth(self) -> int:
        return int(self.rank.shape[2])

    @property
    def valid(self) -> Array:
        """[B, S, D] bool, the text has a token there."""
        steps, depths = np.indices(self.rank.shape[1:])
        return steps + 1 + depths < self.num_tokens[:, None, None]


@torch.inference_mode()
def gather_evidence(
    target: Target,
    drafter: Any,
    texts: Sequence[Text],
    sampling: SamplingConfig,
    depth: int,
    num_siblings: int = 1,
) -> Evidence:
    """Teacher-force target and drafter over texts, one after the other."""
    size = (len(texts), max(1, *(len(text.tokens) - 1 for text in texts)), depth)
    names = [name for name in Evidence.__annotations__ if not name.endswith("_tokens")]
    arrays: dict[str, Array] = {n: np.zeros(size, _DTYPES.get(n, np.float32)) for n in names}
    arrays["accept"] = np.zeros((*size, num_siblings), np.float32)
    deepest = 1
    for index, text in enumerate(texts):
        if len(text.tokens) < 2:
            continue  # a text of one token, which prefill emits, has no step
        reading = read_target(target, text, index, drafter.taps)
        emitted = torch.tensor(text.tokens[1:], device=target.device)
        tokens = torch.tensor([*text.prompt, *text.tokens[:-1]], device=target.device)
        sampler = Sampler([sampling], target.vocab_size, target.device, [text.prompt], ())
        guesses = drafter.forced(tokens, reading.hidden, depth, len(text.prompt) - 1)
        for level, logits in enumerate(guesses):
            _refuse_not_finite("drafter", logits, index, may_ban=True)
            places = (logits, reading.logits[level:], emitted[level:])
            for name, values in _compare(*places, sampler, num_siblings).items():
                arrays[name][index, : len(values), level] = values.numpy()
            deepest = max(deepest, level + 1)
    return Evidence(
        np.array([len(text.tokens) for text in texts]),
        np.array([text.max_tokens for text in texts]),
        **{name: np.ascontiguousarray(rows[:, :, :deepest]) for name, rows in arrays.items()},
    )


def read_target(target: Target, text: Text, index: int, taps: Sequence[int] = ()) -> Reading:
    """Run the target over a text: what it says of every token behind the first new one."""
    reading = read_text(target, [*text.prompt, *text.tokens[:-1]], len(text.prompt), taps)
    _refuse_not_finite("target", reading.logits, index)
    return reading


def _refuse_not_finite(name: str, logits: Tensor, text: int, *, may_ban: bool = False) -> None:
    """Refuse NaN in logits [n, V]; `may_ban` allows rows that are all -inf."""
    best = logits.amax(-1)
    wrong = best.isnan() | (best == float("inf")) if may_ban else ~best.isfinite()
    if bool(wrong.any()):
        raise FloatingPointError(
            f"text {text}, new token {int(wrong.nonzero()[0]) + 1}: the {name}'s logits are NaN or "
            "infinite; check the weights, or load with dtype float32 or bfloat16"
        )


def _compare(
    draft_logits: Tensor, target_logits: Tensor, tokens: Tensor, sampler: Sampler, num_siblings: int
) -> dict[str, Tensor]:
    """Facts of n places, on the CPU, under the names of the fields of `Evidence`."""
    parts = []
    for draft, target, token in zip(
        *(each.split(CHUNK) for each in (draft_logits, target_logits, tokens)), strict=True
    ):
        # The models' own distributions: temperature 1, unfiltered.
        q, p = draft.float().softmax(-1).nan_to_num(0.0), target.float().softmax(-1).nan_to_num(0.0)
        confidence, best_draft = q.max(-1)
        facts = {
            "rank": _ranks(draft, token),
            "draft_prob": _at(q, token),
            "target_prob": _at(p, token),
            "confidence": confidence,
            "best_draft": best_draft,
            "best_target": target.argmax(-1),
            "draft_entropy": torch.special.entr(q).sum(-1),
            "target_entropy": torch.special.entr(p).sum(-1),
        }
        # The distributions that are sampled; empty where the drafter can say nothing.
        q, p = (sampler.probs(each.unsqueeze(0))[0] for each in (draft, target))
        q = q.nan_to_num(0.0).masked_fill(~draft.amax(-1, keepdim=True).isfinite(), 0.0)
        facts["possible"] = _at(p, token) > 0
        # Rounding may lift the overlap of two equal distributions above 1.
        facts["overlap"] = torch.minimum(p, q).sum(-1).clamp(max=1)
        facts["accept"] = _sibling_acceptance(p, q, token, num_siblings)
        parts.append(facts)
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _at(rows: Tensor, tokens: Tensor) -> Tensor:
    return rows.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Number [n] of tokens before each row's own [n], earlier ones first where logits tie.

    A token that cannot be said stands behind all of them, at V.
    """
    own = _at(logits, tokens).unsqueeze(1)
    before = torch.arange(logits.shape[1], device=logits.device) < tokens.unsqueeze(1)
    rank = ((logits > own) | ((logits == own) & before)).sum(-1)
    return torch.where(own.squeeze(1) == float("-inf"), logits.shape[1], rank)


def _sibling_acceptance(p: Tensor, q: Tensor, tokens: Tensor, num_siblings: int) -> Tensor:
    """Probability [n, num_siblings] that the j-th of siblings drawn from q is the one accepted.

    Given that the step emits the text's token x, over the draws and the uniforms of the token
    rule: with p_1 = p and p_{j+1} the normalized positive part of p_j - q, the j-th is accepted
    and is x with probability prod_{l<j} (1 - sum min(p_l, q)) min(p_j, q)(x). The residuals do not
    depend on what was drawn, because draws are with replacement.

    Source: Leviathan et al. 2022, arXiv 2211.17192; SpecInfer, arXiv 2305.09781.
    """
    emitted, tiny = _at(p, tokens), torch.finfo(p.dtype).tiny
    weights, survival = p, torch.ones_like(emitted)
    accepted = []
    for _ in range(num_siblings):
        residual = weights / weights.sum(-1, keepdim=True).clamp(min=tiny)
        both = torch.minimum(residual, q)
        accepted.append(survival * _at(both, tokens))
        survival = survival * (1 - both.sum(-1)).clamp(min=0)
        weights = (residual - q).clamp(min=0)
    given = torch.stack(accepted, 1) / emitted.clamp(min=tiny).unsqueeze(1)
    return given.masked_fill(emitted.unsqueeze(1) == 0, 0.0).clamp(max=1)
