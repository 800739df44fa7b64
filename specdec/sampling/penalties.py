"""Penalties, biases, bad words, a minimum length: all that a row's context does to its logits.

Every node of a draft has its own context: the committed tokens and its path from the root. The
committed part is counted once per row; a path only corrects the few tokens that it contains.

Shapes: B rows, N draft nodes, M logits rows (any of the N + 1), D tree depth, V vocabulary,
W bad words of a row, L the longest bad word. Contexts are listed newest token first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.sampling.config import SamplingConfig
from specdec.verify.draft import Draft

_ANY = -1  # in a bad word's prefix: matches every context, also a missing one
_NEVER = -2  # matches no context: the prefix of a word that only pads its row


class Penalties:
    """The context-dependent part of a batch's sampling settings, and the committed context."""

    # Only where there are penalties of tokens that occurred; counts are of the output alone.
    in_prompt: Tensor  # bool [B, V]
    counts: Tensor  # [B, V]
    # Only where there are bad words of several tokens.
    prefixes: Tensor  # [B, W, L - 1] all but a word's last token, newest first
    last: Tensor  # [B, W] a word's last token
    tail: Tensor  # [B, L - 1] newest committed tokens, newest first

    def __init__(
        self,
        configs: Sequence[SamplingConfig],
        vocab_size: int,
        device: torch.device | str | None,
        prompts: Sequence[Sequence[int]],
        eos_token_ids: Sequence[int],
    ) -> None:
        self.vocab_size = vocab_size
        eos = sorted({token for token in eos_token_ids if 0 <= token < vocab_size})
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        min_new = torch.tensor([config.min_new_tokens for config in configs])
        self.eos_ban_len = min_new if min_new.any() and eos else None  # [B], counts down

        bias = torch.zeros(len(configs), vocab_size)
        longer: list[list[list[int]]] = []  # bad words of several tokens
        for row, config in enumerate(configs):
            check_tokens(config, vocab_size, row)
            for token, value in config.logit_bias.items():
                bias[row, token] = float(value)
            for word in config.bad_words:
                if len(word) == 1 and word[0] not in eos_token_ids:
                    bias[row, word[0]] = -torch.inf
            longer.append([list(word) for word in config.bad_words if len(word) > 1])
        self.bias = bias if bias.any() else None
        self.has_words = any(longer)
        if self.has_words:
            self._tabulate(longer, prompts)

        self.repetition = _per_row([config.repetition_penalty for config in configs], neutral=1.0)
        self.presence = _per_row([config.presence_penalty for config in configs])
        self.frequency = _per_row([config.frequency_penalty for config in configs])
        amounts = (self.repetition, self.presence, self.frequency)
        self.has_penalties = any(amount is not None for amount in amounts)
        if self.has_penalties:
            self.counts = torch.zeros_like(bias)
            self.in_prompt = torch.zeros_like(bias, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                ids = torch.tensor(list(prompt), dtype=torch.long)
                self.in_prompt[row, ids[(ids >= 0) & (ids < vocab_size)]] = True
        self._map_rows(lambda rows: rows.to(device))

    def _tabulate(self, words: Sequence[list[list[int]]], prompts: Sequence[Sequence[int]]) -> None:
        width = max(len(word) for row in words for word in row) - 1
        self.prefixes = torch.full((len(words), max(map(len, words)), width), _NEVER)
        self.last = torch.zeros(self.prefixes.shape[:2], dtype=torch.long)
        for row, row_words in enumerate(words):
            for column, word in enumerate(row_words):
                newest_first = word[-2::-1] + [_ANY] * (width - len(word) + 1)
                self.prefixes[row, column] = torch.tensor(newest_first)
                self.last[row, column] = word[-1]
        tails = [list(prompt)[: -width - 1 : -1] for prompt in prompts]
        self.tail = torch.tensor([tail + [-1] * (width - len(tail)) for tail in tails])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor) and name != "eos":
                setattr(self, name, change(value))

    def keep(self, rows: Tensor) -> None:
        """Keep `rows` [K], int64 on the sampler's device, in that order."""
        self._map_rows(lambda tensor: tensor[rows])

    def observe(self, tokens: Tensor) -> None:
        """Extend the committed context by `tokens` [B, T], -1 padded at the end."""
        if self.has_penalties:
            known = (tokens >= 0) & (tokens < self.vocab_size)
            index = tokens.clamp(0, self.vocab_size - 1)
            self.counts.scatter_add_(1, index, known.to(self.counts.dtype))
        num_new = (tokens >= 0).sum(1, keepdim=True)  # [B, 1]
        if self.eos_ban_len is not None:
            self.eos_ban_len = self.eos_ban_len - num_new.squeeze(1)
        if self.has_words:
            newest_first = torch.cat([tokens.flip(1), self.tail], 1)
            window = torch.arange(self.tail.shape[1], device=tokens.device)
            self.tail = newest_first.gather(1, tokens.shape[1] - num_new + window)

    def apply(self, logits: Tensor, draft: Draft | None, nodes: Tensor | None) -> Tensor:
        """Return processed logits [B, M, V] in at least float32; arguments as `Sampler.scores`."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        path = _path_tokens(draft, nodes, logits.shape[:2], logits.device)
        if self.bias is not None:
            scores += self.bias.unsqueeze(1)
        if self.has_penalties:
            scores = self._penalize(scores, path)
        if self.has_words:
            self._ban_words_(scores, path)
        if self.eos_ban_len is not None:
            depth = (path >= 0).sum(2)  # [B, M]
            banned = depth < self.eos_ban_len.unsqueeze(1)
            of_eos = scores[..., self.eos].masked_fill(banned.unsqueeze(2), -torch.inf)
            scores[..., self.eos] = of_eos
        return scores

    def _penalize(self, scores: Tensor, path: Tensor) -> Tensor:
        """Penalize by the committed context, then redo the tokens that occur on each path."""
        # Padding points at some token too; its value is right, because every entry counts how
        # often its *own* token is on the path. So duplicates agree and no entry needs a mask.
        index = path.clamp(0, self.vocab_size - 1)  # [B, M, D]
        on_path = (index.unsqueeze(3) == path.unsqueeze(2)).sum(3)
        in_prompt, counts = self.in_prompt.unsqueeze(1), self.counts.unsqueeze(1)  # [B, 1, V]
        redone = self._penalized(
            scores.gather(2, index),
            in_prompt.expand_as(scores).gather(2, index),
            counts.expand_as(scores).gather(2, index) + on_path,
        )
        return self._penalized(scores, in_prompt, counts).scatter_(2, index, redone)

    def _penalized(self, scores: Tensor, in_prompt: Tensor, counts: Tensor) -> Tensor:
        in_output = counts > 0
        if self.repetition is not None:
            weaker = torch.where(scores < 0, scores * self.repetition, scores / self.repetition)
            scores = torch.where(in_prompt | in_output, weaker, scores)
        if self.frequency is not None:
            scores = scores - self.frequency * counts
        if self.presence is not None:
            scores = scores - self.presence * in_output
        return scores

    def _ban_words_(self, scores: Tensor, path: Tensor) -> None:
        num_rows, width = path.shape[1], self.tail.shape[1]
        depth = (path >= 0).sum(2, keepdim=True)  # [B, M, 1]
        step = torch.arange(width, device=path.device)
        both = torch.cat([path, self.tail.unsqueeze(1).expand(-1, num_rows, -1)], 2)
        newest = both.gather(2, torch.where(step < depth, step, step - depth + path.shape[2]))
        context, prefixes = newest.unsqueeze(2), self.prefixes.unsqueeze(1)  # [B, M, W, L - 1]
        completes = ((context == prefixes) | (prefixes == _ANY)).all(3)  # [B, M, W]
        ban = torch.zeros_like(completes, dtype=scores.dtype).masked_fill_(completes, -torch.inf)
        # Added, not written: words that share their last token must not overwrite each other.
        scores.scatter_add_(2, self.last.unsqueeze(1).expand_as(ban), ban)


def check_tokens(config: SamplingConfig, vocab_size: int, row: int) -> None:
    """Refuse biases and bad words of tokens outside the vocabulary."""
    named = [("logit_bias", config.logit_bias), *(("bad_words", w) for w in config.bad_words)]
    for name, tokens in named:
        for token in tokens:
            if token >= vocab_size:
                where = f"{name} of row {row} has token {token}"
                raise ValueError(
                    f"{where} but ids of this model are below {vocab_size}; correct it"
                )


def _per_row(values: Sequence[float], neutral: float = 0.0) -> Tensor | None:
    if all(value == neutral for value in values):
        return None
    return torch.tensor([float(value) for value in values]).view(-1, 1, 1)


def _path_tokens(
    draft: Draft | None, nodes: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor:
    """List the tokens from each node up to the root's child, newest first: [B, M, D], -1 padded."""
    depth = 0 if draft is None else min(draft.depth, draft.num_nodes)
    if draft is None or depth == 0:
        return torch.empty(*shape, 0, dtype=torch.long, device=device)
    if draft.parents is None:
        row = torch.arange(draft.num_nodes + 1, device=device) if nodes is None else nodes
        climb = (row.unsqueeze(-1) - torch.arange(depth, device=device)).clamp(min=0)
        climb = climb.expand(draft.batch_size, -1, -1)  # [B, M, D], 0 = the root
    else:
        climb = pad(draft.ancestors[:, :, :depth] + 1, (0, 0, 1, 0))  # [B, N + 1, D]
        if nodes is not None:
            climb = climb.gather(1, nodes.unsqueeze(2).expand(-1, -1, depth))
    of_row = pad(draft.tokens, (1, 0), value=-1)  # [B, N + 1]
    return of_row.gather(1, climb.flatten(1)).unflatten(1, climb.shape[1:])
