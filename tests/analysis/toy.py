"""A target and a drafter that are lookup tables, and their loop with all randomness summed out.

Shares no formula with `specdec.analysis`: a step's law comes from the enumerator of the rules.
"""

import random

import numpy as np
import torch
from verify.verify_enumerator import enumerate_law

from specdec.drafters.base import FixedShape, ShapeOptions
from specdec.engine.interfaces import Capabilities, TargetOutput
from specdec.engine.metrics import ForwardClock
from specdec.verify.tree import from_choices

VOCAB = 3


def law(name, context):
    """Probabilities of the next token; a pure function of name and context."""
    draw = random.Random(f"{name} {context}")
    weights = [draw.uniform(0.05, 1) ** 2 for _ in range(VOCAB)]
    return [weight / sum(weights) for weight in weights]


class ToyTarget:
    """A target whose law is a table."""

    vocab_size, max_context_len, eos_token_ids = VOCAB, 32, ()
    device, tokenizer, capabilities = torch.device("cpu"), None, Capabilities()

    def __init__(self):
        self.clock = ForwardClock(self.device)
        self.committed = []

    def prefill(self, prompts, taps=(), *, join=False):
        (prompt,) = prompts
        self.committed = list(prompt)
        return TargetOutput(torch.tensor([[law("p", tuple(prompt))]]).log())

    def score(self, root, draft, taps=()):
        tokens = [int(root), *draft.tokens[0].tolist()]
        self.scored = tokens
        contexts = [tuple(self.committed + tokens[: n + 1]) for n in range(len(tokens))]
        return TargetOutput(torch.tensor([[law("p", context) for context in contexts]]).log())

    def commit(self, verdict, num_accepted):
        self.committed += self.scored[: num_accepted[0] + 1]

    def reorder(self, rows):
        pass


def draft_law(context, depth):
    """The drafter's law of the token behind a context whose last `depth` tokens are drafted."""
    return law(f"q{depth}", context)


class ToyDrafter:
    """A drafter with a law of its own at every depth."""

    taps: tuple[int, ...] = ()
    shape_options = ShapeOptions({})

    def __init__(self, choices, children="with_replacement", threshold=0.0):
        self.children = children
        self.fixed_shape = FixedShape(from_choices(choices), children, threshold)

    def forced(self, tokens, hidden, depth, first):
        given = tokens.tolist()
        for level in range(depth):
            places = range(first, len(given) - 1 - level)
            if not places:
                return
            rows = [draft_law(tuple(given[: i + 2 + level]), level) for i in places]
            yield torch.tensor(rows).log()


def top_p(probs, mass):
    """The likeliest tokens until their mass exceeds `mass`."""
    kept, total = [0.0] * len(probs), 0.0
    for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if total > mass:
            break
        kept[index], total = probs[index], total + probs[index]
    return [value / sum(kept) for value in kept]


class ToyLoop:
    """The loop on toys, by enumeration of drafts and verdicts; `process` makes a sampled law."""

    def __init__(self, shape, process=lambda probs: probs):
        tree = shape.tree
        self.shape, self.process = shape, process
        self.parents, self.ranks = tree.parents.tolist(), tree.ranks.tolist()

    def expected(self, text):
        """E[steps], E[drafted] and P(text), given that the loop emits this text."""
        weight, steps, nodes = self._from(text, 1)
        return steps / weight, nodes / weight

    def _from(self, text, done):
        """P(rest of the text), and its product with the steps and nodes that follow."""
        left = text.tokens[done:]
        if not left:
            return 1.0, 0.0, 0.0
        context = (*text.prompt, *text.tokens[:done])
        budget = min(text.max_tokens - done - 1, len(self.parents))
        total = np.zeros(3)
        for chance, tokens in self._drafts(context, budget):
            for emitted, share in self._step(context, tokens).items():
                new = min(len(emitted), len(left))
                if list(emitted[:new]) == left[:new]:
                    weight, steps, nodes = self._from(text, done + new)
                    rest = (weight, steps + weight, nodes + len(tokens) * weight)
                    total += chance * share * np.array(rest)
        return total

    def _drafts(self, context, budget, tokens=(), survival=1.0):
        """(probability, tokens) of every draft of at most `budget` nodes that begins so."""
        node = len(tokens)
        if node < budget:
            probs = draft_law(*self._place(context, tokens, node))
            survival *= max(probs)
        if node == budget or survival < self.shape.threshold:
            yield 1.0, tokens
            return
        chances = self.process(probs)
        if self.shape.children == "top":
            order = sorted(range(VOCAB), key=lambda token: -probs[token])
            chances = [float(token == order[self.ranks[node]]) for token in range(VOCAB)]
        for token in filter(chances.__getitem__, range(VOCAB)):
            for rest, whole in self._drafts(context, budget, (*tokens, token), survival):
                yield chances[token] * rest, whole

    def _place(self, context, tokens, node):
        """The context of a node's law, and its depth."""
        path, above = [], self.parents[node]
        while above >= 0:
            path.append(tokens[above])
            above = self.parents[above]
        return (*context, *reversed(path)), len(path)

    def _step(self, context, tokens):
        places = [self._place(context, tokens, node) for node in range(len(tokens))]
        behind = [
            context,
            *((*place[0], token) for place, token in zip(places, tokens, strict=True)),
        ]
        rows = [self.process(law("p", each)) for each in behind]
        laws = [self.process(draft_law(*place)) for place in places]
        laws = None if self.shape.children == "top" else laws
        return enumerate_law("token", rows, laws, tokens, self.parents[: len(tokens)])
