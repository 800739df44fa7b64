"""Suffix lookup: continue the longest suffix seen before, by how often each token followed."""

import heapq
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.common.arguments import require_counts
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.drafters.training import Node, match_confidence, pack_rows
from specdec.engine.clock import ForwardClock
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict


class SuffixDrafter:
    """Drafts from suffix automata over the row's own text and over past outputs.

    Of the row's own automaton and the shared one, the one with the longer match drafts: nodes are
    taken best first by estimated probability, the product of count shares along the path. Past
    outputs change what is drafted, never what is emitted.

    Args:
        max_nodes: node budget.
        max_match: longest suffix that is followed.
        min_match: shortest suffix worth drafting from.
        min_probability: nodes estimated below this are not drafted.
        factor: levels drafted per matched token.
        num_remembered: past outputs kept for later prompts, at most; where there are more, the
            older half goes. 0 forgets them all.
        width: children per node; 1 makes chains.

    Source: SuffixDecoding, arXiv 2411.04975; SAM-Decoding, arXiv 2411.10666.
    """

    taps: tuple[int, ...] = ()
    expected: Sequence[float] = ()  # accepted tokens expected of each row's last draft

    def __init__(
        self,
        max_nodes: int = 8,
        max_match: int = 32,
        min_match: int = 2,
        min_probability: float = 0.1,
        factor: float = 2.0,
        num_remembered: int = 64,
        width: int = 1,
    ) -> None:
        require_counts(max_nodes=max_nodes, width=width)
        require_counts(2**20, max_match=max_match, min_match=min_match)
        if min_match > max_match:
            raise ValueError(
                f"min_match is {min_match} and max_match {max_match}: "
                "choose 1 <= min_match <= max_match"
            )
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability is {min_probability} but must be in [0, 1]")
        if factor <= 0 or not 0 <= num_remembered <= 2**20:
            raise ValueError(
                f"factor is {factor} and num_remembered {num_remembered}: factor must be "
                f"positive, num_remembered at least 0 and at most {2**20}"
            )
        self.max_nodes = max_nodes
        self.makes_trees = width > 1
        self.clock = ForwardClock(torch.device("cpu"))
        self._max_match = max_match
        self._limits = (min_match, min_probability, factor, width)
        self._num_remembered = num_remembered
        self._past: deque[list[int]] = deque(maxlen=num_remembered)
        self._shared = SuffixAutomaton()
        self._rows: list[_Row] = []

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Index the prompts; what the batch before emitted joins the past outputs."""
        if not join:
            for row in self._rows:
                self._remember(row)
            self._rows = []
        self._rows += [_Row(prompt, self._shared, self._max_match) for prompt in prompts]

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Continue every row's longest known suffix."""
        grown = [
            row.grow(min(limit, self.max_nodes), *self._limits) if limit else ([], [])
            for row, limit in zip(self._rows, budget, strict=True)
        ]
        self.expected = [sum(confidences) for _, confidences in grown]
        return pack_rows(
            [nodes for nodes, _ in grown],
            root.device,
            as_chain=not self.makes_trees,
            confidences=[confidences for _, confidences in grown],
        )

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Add the new tokens."""
        for row, tokens in zip(self._rows, committed, strict=True):
            row.extend(tokens)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows; the outputs of the others join the past ones."""
        stay = rows.tolist()
        kept = set(stay)
        for index, row in enumerate(self._rows):
            if index not in kept:
                self._remember(row)
        self._rows = [self._rows[row] for row in stay]

    def _remember(self, row: "_Row") -> None:
        if not self._num_remembered:
            return
        is_full = len(self._past) == self._num_remembered
        self._past.append(row.output)
        if not is_full:
            self._shared.add(row.output)
            return
        # An automaton cannot forget: rebuild it from half of the past now and then.
        for _ in range(self._num_remembered // 2):
            self._past.popleft()
        self._shared = SuffixAutomaton()
        for output in self._past:
            self._shared.add(output)


class _Row:
    """One row: its text as an automaton, and where it stands in both automata."""

    def __init__(self, prompt: Sequence[int], shared: SuffixAutomaton, max_match: int) -> None:
        self.output = [prompt[-1]]
        self._own = SuffixAutomaton()
        self._shared = shared
        self._max_match = max_match
        self._own_match = (0, 0)
        self._shared_match = (0, 0)
        self._follow(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens."""
        self.output.extend(tokens)
        self._follow(tokens)

    def _follow(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Matched before it is added, so that the text does not match itself.
            self._own_match = self._own.match(*self._own_match, token, self._max_match)
            self._own.append(token)
            self._shared_match = self._shared.match(*self._shared_match, token, self._max_match)

    def grow(
        self,
        budget: int,
        min_match: int,
        min_probability: float,
        factor: float,
        width: int,
    ) -> tuple[list[Node], list[float]]:
        """Nodes of the draft, best first, and the confidence in each."""
        own = (self._own, *self._own.earlier(*self._own_match))
        shared = (self._shared, *self._shared.earlier(*self._shared_match))
        automaton, state, length = max(own, shared, key=lambda found: found[2])
        if length < min_match:
            return [], []
        levels = max(1, int(factor * length))
        nodes: list[Node] = []
        confidences: list[float] = []
        queue: list[tuple[float, int, int, int, int, int]] = []
        order = 0

        def offer(parent: int, origin: int, probability: float, level: int) -> None:
            nonlocal order
            for share, token, after in automaton.children(origin, width):
                if probability * share >= min_probability:
                    order += 1
                    entry = (-probability * share, order, parent, token, after, level)
                    heapq.heappush(queue, entry)

        offer(-1, state, 1.0, 1)
        while queue and len(nodes) < budget:
            negative, _, parent, token, after, level = heapq.heappop(queue)
            nodes.append((parent, token))
            confidences.append(-negative * match_confidence(length, level))
            if level < levels:
                offer(len(nodes) - 1, after, -negative, level + 1)
        return nodes, confidences
