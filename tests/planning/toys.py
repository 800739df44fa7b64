"""Machines and drafters that follow formulas, in place of measured ones."""

from dataclasses import dataclass

from specdec.drafters.base import DraftShape
from specdec.planning.candidates import Candidate, chain
from specdec.planning.costs import Costs, ForwardCost
from specdec.planning.results import ForwardPoint
from specdec.planning.times import Step, TimedRun

CONTEXT = 100.0
NO_DRAFT = DraftShape(0, 1, 0, False)
CHAINS = [chain(depth) for depth in range(1, 13)]


@dataclass(frozen=True)
class ToyExpected:
    """Acceptance of one prompt or more."""

    tokens: list
    steps: list
    drafted: list
    tested_at: list

    @property
    def tau(self):
        return (sum(self.tokens) - len(self.tokens)) / sum(self.steps)

    def tau_interval(self):
        return None


def expected(tau, nodes, num_steps=100.0, num_prompts=3):
    """The same tau for every prompt, with every draft as large as it may be."""
    tokens, drafted = 1 + tau * num_steps, nodes * num_steps
    steps = [num_steps] * num_prompts
    return ToyExpected(
        [tokens] * num_prompts, steps, [drafted] * num_prompts, [[num_steps]] * num_prompts
    )


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

    def step(self, shape, nodes, batch_size):
        levels = min(shape.depth or nodes, nodes)
        return Step(
            self.level_s * levels,
            self.forward(batch_size, nodes + 1),
            self.rest_s + self.node_s * nodes,
            context=CONTEXT,
            nodes=nodes,
        )

    def points(self, batch_sizes):
        return [
            ForwardPoint(
                batch_size=size,
                new_tokens=count,
                context=context,
                is_tree=is_tree,
                median_s=self.forward(size, count),
                spread_s=0.0,
                repeats=1,
            )
            for size in batch_sizes
            for count in (1, 2, 4, 8, 16, 32, 64)
            for context in (50, 200)
            for is_tree in (False, True)
        ]

    def costs(self, timed, batch_sizes=(1,), finals=()):
        """Costs fitted to decodings of these candidates, all steps alike."""
        runs = {}
        for size in batch_sizes:
            plain = self.step(NO_DRAFT, 0, size)
            runs[size] = [TimedRun(None, [plain] * 5, plain.wall_s)]
            runs[size] += [
                TimedRun(c, [self.step(c.shape, c.shape.nodes, size)] * 5, plain.wall_s)
                for c in timed
            ]
        return Costs(ForwardCost(self.points(batch_sizes)), runs, finals)


def candidate(shape, kind="eagle", drafter="eagle"):
    options = {"depth": shape.depth, "width": shape.width, "max_nodes": shape.nodes}
    return Candidate(str(shape), kind, options, drafter, shape)
