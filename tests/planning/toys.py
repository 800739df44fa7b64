"""Machines and drafters that follow formulas, in place of measured ones."""

from dataclasses import dataclass

import numpy as np

from specdec.analysis.predict import Expected
from specdec.drafters.base import DraftShape
from specdec.planning.candidates import Candidate, chain
from specdec.planning.costs import Costs
from specdec.planning.measure import TimedRun

CONTEXT = 100.0
NO_DRAFT = DraftShape(0, 1, 0, False)
CHAINS = [chain(depth) for depth in range(1, 13)]


def acceptance(tokens, steps, drafted, judging):
    return Expected(tokens, steps, drafted, [], [[each] for each in judging])


def expected(tau, nodes):
    """One prompt, with every draft as large as it may be."""
    return acceptance([1 + 100 * tau], [100], [100 * nodes], [100])


def chain_tau(alpha, length):
    return sum(alpha**depth for depth in range(length + 1))


def tree_tau(alpha, shape):
    """Grows with depth, width and nodes, each less and less."""
    wide = 1 - (1 - alpha) ** min(shape.width, 1 + shape.nodes / (2 * shape.depth))
    return chain_tau(wide, shape.depth)


@dataclass(frozen=True)
class Machine:
    """Seconds of a step by formula.

    `forward_s` is a forward of one token; each further token of each row adds `per_token_s`.
    """

    forward_s: float = 4e-3
    per_token_s: float = 1e-4
    level_s: float = 5e-4
    rest_s: float = 3e-4
    node_s: float = 1e-5

    def forward(self, batch_size, new_tokens):
        return self.forward_s + self.per_token_s * (batch_size * new_tokens - 1)

    def times(self, shape, nodes, batch_size=1):
        """Seconds in the drafter, in the target, and of everything else."""
        levels = min(shape.depth or nodes, nodes)
        forward = self.forward(batch_size, nodes + 1)
        return np.array([self.level_s * levels, forward, self.rest_s + self.node_s * nodes])

    def wall(self, shape, nodes, batch_size=1):
        return self.times(shape, nodes, batch_size).sum()

    def cells(self, batch_sizes=(1,)):
        def times(batch):
            return {count: self.forward(batch, count) for count in (1, 2, 4, 8, 16, 32, 64)}

        return [
            {"batch": batch, "context": context, "chain": times(batch), "tree": times(batch)}
            for batch in batch_sizes
            for context in (50, 200)
        ]

    def run(self, candidate, batch_size=1, scale=1.0, round=0, plain_s=None):
        """Five steps of a candidate, None for plain decoding; `scale` is of its three parts."""
        shape = candidate.shape if candidate else NO_DRAFT
        times = self.times(shape, shape.nodes, batch_size) * scale
        plain_s = self.wall(NO_DRAFT, 0, batch_size) if plain_s is None else plain_s
        return TimedRun(candidate, steps(times, shape.nodes), plain_s, round)

    def costs(self, timed, batch_sizes=(1,), finals=()):
        """Costs fitted to decodings of these candidates, all steps alike."""
        costs = Costs(self.cells(batch_sizes), CONTEXT)
        for size in batch_sizes:
            costs.add(size, [self.run(each, size) for each in (None, *timed)])
        costs.time(1, finals)
        return costs


def steps(times, nodes, count=5):
    return np.array([[CONTEXT, nodes, *times]] * count)


def candidate(shape, kind="eagle"):
    options = {"depth": shape.depth, "width": shape.width, "max_nodes": shape.nodes}
    return Candidate(str(shape), kind, options, kind, shape)
