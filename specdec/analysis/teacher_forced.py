"""A drafter's distributions at every place of texts, against the target's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.analysis.acceptance_math import compare, refuse_not_finite
from specdec.analysis.texts import Text
from specdec.engine.interfaces import Target
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.targets.taps import read_text

Array = np.ndarray[Any, Any]


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
        target_prob: [B, S, D] float32 of the token, as the models give it: at temperature 1,
            unfiltered. So are the five below.
        draft_prob: the drafter's probability of the token.
        confidence: the drafter's highest probability.
        target_entropy: in nats.
        draft_entropy: in nats.
        best_draft: [B, S, D] int32 the drafter's likeliest token.
        best_target: [B, S, D] int32 the target's.
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
        """D, the levels that were looked at."""
        return int(self.rank.shape[2])

    @property
    def num_siblings(self) -> int:
        """W."""
        return int(self.accept.shape[3])

    @property
    def valid(self) -> Array:
        """[B, S, D] bool, the text has a token there."""
        steps, depths = np.arange(self.rank.shape[1]), np.arange(self.depth)
        token: Array = steps[:, None] + 1 + depths
        return token[None] < self.num_tokens[:, None, None]

    def arrays(self) -> dict[str, Array]:
        """All fields by name, for a file."""
        return {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}


_DTYPES = {"rank": np.int32, "best_draft": np.int32, "best_target": np.int32, "possible": np.bool_}


def gather_evidence(
    target: Target,
    drafter: Any,
    texts: Sequence[Text],
    sampling: SamplingConfig,
    depth: int,
    num_siblings: int = 1,
) -> Evidence:
    """Teacher-force target and drafter over texts, one after the other."""
    rows = [
        _levels(target, drafter, text, index, sampling, depth, num_siblings)
        for index, text in enumerate(texts)
    ]
    size = (len(texts), max(1, *(len(text.tokens) - 1 for text in texts)), max(1, *map(len, rows)))
    facts = [f.name for f in fields(Evidence) if f.name not in ("num_tokens", "max_tokens")]
    arrays: dict[str, Array] = {
        name: np.zeros(size, _DTYPES.get(name, np.float32)) for name in facts
    }
    arrays["accept"] = np.zeros((*size, num_siblings), np.float32)
    for row, levels in enumerate(rows):
        for level, found in enumerate(levels):
            for name, values in found.items():
                arrays[name][row, : len(values), level] = values.numpy()
    return Evidence(
        np.array([len(text.tokens) for text in texts]),
        np.array([text.max_tokens for text in texts]),
        **arrays,
    )


@torch.inference_mode()
def _levels(
    target: Target,
    drafter: Any,
    text: Text,
    index: int,
    sampling: SamplingConfig,
    depth: int,
    num_siblings: int,
) -> list[dict[str, Tensor]]:
    """Facts [T - 1 - k] of every level k; none of a text of one token, which prefill emits."""
    if len(text.tokens) < 2:
        return []
    given = [*text.prompt, *text.tokens[:-1]]
    reading = read_text(target, given, len(text.prompt), drafter.taps)
    refuse_not_finite("target", reading.logits, index)
    emitted = torch.tensor(text.tokens[1:], device=target.device)
    tokens = torch.tensor(given, device=target.device)
    sampler = Sampler([sampling], target.vocab_size, target.device, [text.prompt], ())
    levels = []
    guesses = drafter.forced(tokens, reading.hidden, depth, len(text.prompt) - 1)
    for level, logits in enumerate(guesses):
        refuse_not_finite("drafter", logits, index, may_ban=True)
        levels.append(
            compare(logits, reading.logits[level:], emitted[level:], sampler, num_siblings)
        )
    return levels
