"""From logits to probabilities and tokens, each row of a batch by its own settings.

A drafter that samples uses the target's `Sampler` on its own logits, so that both distributions are
processed alike. Shapes: B rows, N draft nodes, M logits rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.sampling.config import SamplingConfig
from specdec.sampling.penalties import Penalties
from specdec.verify.draft import Draft

__all__ = ["Sampler", "SamplingConfig", "sample", "sample_without_replacement"]


class Sampler:
    """The sampling settings of a batch, with the committed context of every row.

    The order is transformers': logit bias, repetition penalty, (frequency and presence penalty,)
    bad words, minimum length; then temperature, top-k, top-p, min-p.
    Only `keep` reads values on the host; all else is free of synchronization.

    Args:
        configs: one per row.
        vocab_size: V of the logits to process.
        device: device of the logits.
        prompts: token ids, one sequence per row.
        eos_token_ids: tokens that `min_new_tokens` bans; ids past the vocabulary are ignored.
        shared_stream: the stream that the target draws each token from, at the token's position,
            where it does (rule "match"); None elsewhere. A drafter that draws from it as well
            agrees with the target as often as their distributions do, without a bias: the emitted
            token is the target's own draw.

    Attributes:
        configs: the settings, one a row.
        is_greedy: every row is at temperature 0.
        is_plain: no row has a bias, a penalty, a bad word or a minimum length.
        seeds: [B] int64.

    Raises:
        ValueError: configs and prompts differ in number, there are none, or a token of
            `logit_bias` or `bad_words` lies outside the vocabulary.
    """

    def __init__(
        self,
        configs: Sequence[SamplingConfig],
        vocab_size: int,
        device: torch.device | str | None,
        prompts: Sequence[Sequence[int]],
        eos_token_ids: Sequence[int],
        shared_stream: int | None = None,
    ) -> None:
        if not configs or len(configs) != len(prompts):
            sizes = f"configs has {len(configs)} rows and prompts {len(prompts)}"
            raise ValueError(f"{sizes}: give one of each for every row, at least one")
        self.vocab_size, self.device, self.shared_stream = vocab_size, device, shared_stream
        self._penalties: Penalties | None = None
        self._compile(configs)
        if not self.is_plain:
            self._penalties = Penalties(configs, vocab_size, device, prompts, eos_token_ids)

    def _compile(self, configs: Sequence[SamplingConfig]) -> None:
        """Turn settings into [B, 1, 1] tensors; greedy rows get neutral filters."""
        self.configs = tuple(configs)
        self.is_greedy = all(config.is_greedy for config in configs)
        self.is_plain = all(config.is_plain for config in configs)
        self.seeds = torch.tensor([int(config.seed) for config in configs], device=self.device)
        if self.is_greedy:
            return
        greedy = [config.is_greedy for config in configs]
        rows = [SamplingConfig(temperature=1) if c.is_greedy else c for c in configs]
        top_k = [row.top_k if 0 < row.top_k < self.vocab_size else 0 for row in rows]
        limited = [i for i, row in enumerate(rows) if row.top_p < 1]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=self.device).view(-1, 1, 1)

        self._greedy = column(greedy) if any(greedy) else None
        self._temperature = column([float(row.temperature) for row in rows])
        self._max_k, self._top_k = max(top_k), column(top_k)
        self._num_top_p = len(limited)
        self._top_p_rows = torch.tensor(limited, dtype=torch.long, device=self.device)
        # In double precision, as transformers does: 1 - 0.9 in float32 is another number.
        self._tail_mass = column([1 - float(rows[i].top_p) for i in limited])
        self._uses_min_p = any(row.min_p > 0 for row in rows)
        self._min_p = column([float(row.min_p) for row in rows])

    def scores(
        self, logits: Tensor, draft: Draft | None = None, nodes: Tensor | None = None
    ) -> Tensor:
        """Apply what depends on the context: penalties, biases, bad words, minimum length.

        Each logits row has its own context: everything committed, then the path from the root.

        Args:
            logits: [B, M, V]. M is N + 1 (row 0 follows the root, row i + 1 node i) unless `nodes`
                says otherwise.
            draft: the tokens after the root; None: only the root's row, M = 1.
            nodes: [B, M] int64, index of each logits row among the N + 1 rows, for a drafter that
                has logits for its newest nodes only. Values in [0, N], padding included.

        Returns:
            [B, M, V]: `logits` itself if `is_plain`, else a new tensor in at least float32.
            Rows past the draft's lengths hold arbitrary values.

        Raises:
            ValueError: the shapes do not fit together.
        """
        num_nodes = 0 if draft is None else draft.num_nodes
        num_rows = num_nodes + 1 if nodes is None else nodes.shape[-1]
        expected = (len(self.configs), num_rows, self.vocab_size)
        if logits.shape != expected:
            raise ValueError(
                f"logits has shape {tuple(logits.shape)} but this batch, draft and vocabulary need "
                f"{expected}; pass nodes for logits of some of the draft's {num_nodes + 1} rows"
            )
        if nodes is not None and nodes.shape != expected[:2]:
            raise ValueError(f"nodes has shape {tuple(nodes.shape)} but must be {expected[:2]}")
        if self._penalties is None:
            return logits
        return self._penalties.apply(logits, draft, nodes)

    def probs(self, scores: Tensor) -> Tensor:
        """Turn processed logits into the distribution that tokens are drawn from.

        Args:
            scores: [B, M, V] from `scores`.

        Returns:
            [B, M, V] float32. Rows at temperature 0 are one-hot, the first token winning ties.
            A row with a NaN or +inf, or with every token banned, holds no distribution.
        """
        if self.is_greedy:
            return _one_hot(scores)
        filtered = scores.to(torch.float32) / self._temperature
        if self._max_k:
            self._keep_top_k_(filtered)
        if self._num_top_p:
            self._keep_top_p_(filtered)
        probs = torch.softmax(filtered, -1)
        if self._uses_min_p:
            unlikely = probs < self._min_p * probs.amax(-1, keepdim=True)
            probs = torch.softmax(filtered.masked_fill_(unlikely, -torch.inf), -1)
        if self._greedy is None:
            return probs
        return torch.where(self._greedy, _one_hot(scores), probs)

    def _keep_top_k_(self, scores: Tensor) -> None:
        best = torch.topk(scores, self._max_k).values  # [B, M, max_k] descending
        index = (self._top_k - 1).clamp(min=0).expand(*scores.shape[:2], 1)
        cutoff = best.gather(2, index).masked_fill(self._top_k == 0, -torch.inf)
        scores.masked_fill_(scores < cutoff, -torch.inf)

    def _keep_top_p_(self, scores: Tensor) -> None:
        everywhere = self._num_top_p == len(self.configs)
        limited = scores if everywhere else scores[self._top_p_rows]
        ascending, order = torch.sort(limited)
        below = torch.softmax(ascending, -1).cumsum(-1) <= self._tail_mass
        below[..., -1] = False  # the likeliest token always stays
        limited.masked_fill_(below.scatter(-1, order, below), -torch.inf)
        if not everywhere:
            scores.index_copy_(0, self._top_p_rows, limited)

    def observe(self, tokens: Tensor) -> None:
        """Add committed tokens [B, T], -1 padded at the end, to the rows' contexts."""
        if self._penalties is not None:
            self._penalties.observe(tokens)

    def keep(self, rows: Tensor) -> None:
        """Keep the rows [K] int64, in that order; the others have left the batch."""
        self._compile([self.configs[row] for row in rows.tolist()])
        if self.is_plain:
            self._penalties = None
        elif self._penalties is not None:
            self._penalties.keep(rows.to(self.seeds.device))


def _one_hot(scores: Tensor) -> Tensor:
    probs = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
    return probs.scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def _race(probs: Tensor, noise: Tensor) -> Tensor:
    # Clamping keeps 0 / 0 out: an impossible token scores 0, also where its noise is 0.
    return probs / noise.clamp(min=torch.finfo(noise.dtype).tiny)


def sample(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw one token per distribution by an exponential race.

    Args:
        probs: [..., V], need not be normalized; at least one positive entry a row.
        noise: [..., V] i.i.d. Exp(1), broadcast against `probs`.

    Returns:
        [...] int64; never a token of probability 0.
    """
    return _race(probs, noise).argmax(-1)


def sample_without_replacement(probs: Tensor, noise: Tensor, k: int) -> Tensor:
    """Draw k different tokens per distribution, each from what the earlier ones left.

    Args:
        probs: [..., V], as in `sample`.
        noise: [..., V] i.i.d. Exp(1).
        k: at least 1; more than V counts as V.

    Returns:
        [..., min(k, V)] int64 in the order of the draws; -1 once no token has probability left.

    Raises:
        ValueError: k is less than 1.

    Source: Efraimidis and Spirakis 2006; Kool et al. 2019, arXiv 1903.06059.
    """
    if k < 1:
        raise ValueError(f"k is {k} but must be at least 1: it counts the tokens to draw")
    finish = _race(probs, noise).topk(min(k, probs.shape[-1]))
    return finish.indices.masked_fill(finish.values == 0, -1)
