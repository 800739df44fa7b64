"""The largest logits of a place, and how much probability all others share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopLogits:
    """Logits of N places.

    With Z = sum(exp(values)) + exp(rest), exp(values) / Z are the exact probabilities of the kept
    tokens and exp(rest) / Z is that of all others together.

    Attributes:
        values: [N, K] as the target gave them; the argmax is among them.
        ids: [N, K] int64; None where all V are kept, in the order of the vocabulary.
        rest: [N] float32, log-sum-exp of the logits that are not kept; None where all are.
    """

    values: Tensor
    ids: Tensor | None
    rest: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> "TopLogits":
        """Of logits [N, V]."""
        if top_k == logits.shape[-1]:
            return cls(logits, None, None)
        ids = logits.topk(top_k, -1).indices
        # Of equal logits topk takes any, argmax the first; training compares argmaxes.
        best = logits.argmax(-1)
        is_missing = (ids != best.unsqueeze(-1)).all(-1)
        ids[is_missing, 0] = best[is_missing]
        # Not Z minus the kept ones: where the rest is small, that difference would be noise.
        rest = logits.float().scatter(-1, ids, -math.inf).logsumexp(-1)
        return cls(logits.gather(-1, ids), ids, rest)

    def to(self, device: torch.device) -> "TopLogits":
        """On another device."""
        ids = None if self.ids is None else self.ids.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        return TopLogits(self.values.to(device), ids, rest)

    def dense(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Logits [N, V]: the kept ones exact, the others all alike, with their exact sum.

        Probabilities of kept tokens, the argmax, and any divergence's share of the kept tokens are
        thereby exact (up to `dtype`); among the other tokens the target's order is lost.
        """
        if self.ids is None or self.rest is None:
            return self.values.to(dtype)
        top_k = self.values.shape[-1]
        each = self.rest - math.log(vocab_size - top_k)
        # No other logit was larger than the least kept one; rounding shall not make it so.
        each = torch.minimum(each, self.values.float().amin(-1)).to(dtype)
        whole = each.unsqueeze(-1).repeat(1, vocab_size)
        return whole.scatter_(-1, self.ids, self.values.to(dtype))
