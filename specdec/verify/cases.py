"""Small worlds in which a rule's output distribution can be computed exactly.

A world has a handful of tokens and a table of conditional distributions, one for every prefix of up
to `horizon - 1` tokens. Targets and drafters are both such tables.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from specdec.verify.draft import Draft
from specdec.verify.law import VerdictLaw

CHAIN_SHAPE = (-1, 0, 1)
TREE_SHAPES = ((-1, -1, 0, 0), (-1, 0, 0, 1), (-1, 0, -1, 2))
SIBLING_KINDS = ("deterministic", "independent", "without replacement")


@dataclass(frozen=True)
class World:
    """A table of conditional distributions: prefix -> float64 [V]."""

    table: dict[tuple[int, ...], Tensor]
    vocab_size: int
    horizon: int

    @classmethod
    def random(
        cls,
        vocab_size: int,
        horizon: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> "World":
        """Draw random logits for every prefix; temperature 0 gives one-hot rows."""
        table = {}
        for length in range(horizon):
            for prefix in product(range(vocab_size), repeat=length):
                logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
                table[prefix] = _process(logits, temperature, top_p)
        return cls(table, vocab_size, horizon)

    def rounded(self, dtype: torch.dtype) -> "World":
        """Return the world as `dtype` sees it, normalised again."""
        rows = {prefix: row.to(dtype).double() for prefix, row in self.table.items()}
        return World(
            {prefix: row / row.sum() for prefix, row in rows.items()}, self.vocab_size, self.horizon
        )

    def joint(self) -> Tensor:
        """Compute the distribution of the first `horizon` tokens: [V, ..., V]."""
        return self.continuation(())

    def continuation(self, prefix: tuple[int, ...]) -> Tensor:
        """Compute the distribution of the tokens after `prefix`, up to the horizon."""
        if len(prefix) == self.horizon:
            return torch.ones((), dtype=torch.float64)
        after = [self.continuation((*prefix, token)) for token in range(self.vocab_size)]
        row = self.table[prefix]
        return torch.stack([row[token] * after[token] for token in range(self.vocab_size)])


@dataclass(frozen=True, eq=False)
class Case:
    """Every draft a drafter can produce, as the rows of one batch, and how likely each is.

    Attributes:
        draft: B = number of realisations.
        target_probs: [B, N + 1, V].
        weights: [B] float64, summing to one.
    """

    draft: Draft
    target_probs: Tensor
    weights: Tensor


def build_case(
    target: World,
    drafter: World,
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    as_chain: bool = False,
) -> Case:
    """Enumerate the drafts of one tree shape; `kind` is one of `SIBLING_KINDS`."""
    realisations = _realisations(drafter, shape, kind)
    tokens = torch.tensor([tokens for tokens, _, _ in realisations])
    target_rows = []
    for path_tokens, _, _ in realisations:
        paths = [_prefix(shape, path_tokens, node) for node in range(len(shape))]
        target_rows.append(torch.stack([target.table[path] for path in [(), *paths]]))
    probs = None
    if kind != "deterministic":
        probs = torch.stack([torch.stack(laws) for _, laws, _ in realisations]).to(dtype)
    depth = max(len(_prefix(shape, (0,) * len(shape), node)) for node in range(len(shape)))
    draft = Draft.tree(tokens, torch.tensor(shape), depth=depth, probs=probs)
    if as_chain:
        draft = Draft.chain(tokens, probs=probs)
    weights = torch.tensor([weight for _, _, weight in realisations], dtype=torch.float64)
    return Case(draft, torch.stack(target_rows).to(dtype), weights)


def emitted_joint(case: Case, law: VerdictLaw, target: World) -> Tensor:
    """Compute the distribution of the first `horizon` tokens when a rule emits them.

    What the rule does not emit is sampled from the target afterwards.
    """
    joint = torch.zeros_like(target.joint())
    outcome_probs = law.probs * case.weights.unsqueeze(1)
    tokens = case.draft.tokens.tolist()
    for row, outcome in (outcome_probs > 0).nonzero().tolist():
        path = [node for node in law.paths[row, outcome].tolist() if node >= 0]
        prefix = tuple(tokens[row][node] for node in path)
        for token, prob in enumerate(law.last_probs[row, outcome].tolist()):
            if prob > 0:
                emitted = (*prefix, token)
                share = outcome_probs[row, outcome] * prob
                joint[emitted] += share * target.continuation(emitted)
    return joint


def total_variation(first: Tensor, second: Tensor) -> float:
    """Compute half the absolute difference of two distributions."""
    return 0.5 * (first - second).abs().sum().item()


def _process(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    probs = torch.softmax(logits / temperature, 0)
    ranked, order = probs.sort(descending=True)
    dropped = order[ranked.cumsum(0) - ranked >= top_p]
    probs[dropped] = 0
    return probs / probs.sum()


def _prefix(shape: tuple[int, ...], tokens: tuple[int, ...], node: int) -> tuple[int, ...]:
    """Spell the tokens from the root's child down to `node`."""
    parent = shape[node]
    above = () if parent < 0 else _prefix(shape, tokens, parent)
    return (*above, tokens[node])


def _realisations(
    drafter: World, shape: tuple[int, ...], kind: str
) -> list[tuple[tuple[int, ...], list[Tensor], float]]:
    """List (tokens, law of each node, probability) of every draft the drafter can produce."""
    partial: list[tuple[tuple[int, ...], list[Tensor], float]] = [((), [], 1.0)]
    for node, parent in enumerate(shape):
        grown = []
        for tokens, laws, weight in partial:
            above = () if parent < 0 else _prefix(shape, tokens, parent)
            earlier = [tokens[i] for i in range(node) if shape[i] == parent]
            law = _node_law(drafter.table[above], earlier, kind)
            for token in law.nonzero().flatten().tolist():
                grown.append(((*tokens, token), [*laws, law], weight * law[token].item()))
        partial = grown
    return partial


def _node_law(row: Tensor, earlier: list[int], kind: str) -> Tensor:
    if kind == "deterministic":  # the drafter's best tokens in order
        best = row.argsort(descending=True)[len(earlier)]
        return torch.nn.functional.one_hot(best, row.numel()).double()
    if kind == "independent" or not earlier:
        return row
    left = row.clone()
    left[earlier] = 0
    if left.sum() == 0:  # the drafter has run out of tokens: any law will do, as long as it is true
        left = torch.ones_like(row)
        left[earlier] = 0
    return left / left.sum()
