"""Suffix lookup: continue the longest suffix seen before, by how often each token followed."""

import heapq
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from specdec.common.arguments import require_counts
from specdec.drafters.base import BaseDrafter, ShapeOptions
from specdec.drafters.lookup import Node, match_confidence, pack_rows
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict


class SuffixAutomaton:
    """All substrings of a growing text, with how often each of them occurred.

    A state stands for substrings that end at the same places. `_count[s]` is the number of those
    places: a new token adds one to every state on its suffix chain. Adding costs the length of
    that chain, which is logarithmic in ordinary text; chains are followed to a bounded depth.

    Source: the online automaton of Blumer et al. 1985.
    """

    _MAX_CHAIN = 64

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._len = [0]
        self._count = [0]
        self._last = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Add a separate text: nothing continues across its borders."""
        self._last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token to the current text."""
        last = self._last
        known = self._next[last].get(token)
        if known is not None:
            # A text that begins as another did: reuse or split its state.
            exact = self._len[known] == self._len[last] + 1
            current = known if exact else self._split(known, last, token)
        else:
            current = self._extend(last, token)
        self._last = current
        for _ in range(self._MAX_CHAIN):
            if current <= 0:
                break
            self._count[current] += 1
            current = self._link[current]

    def _extend(self, last: int, token: int) -> int:
        current = self._new_state({}, self._len[last] + 1, 0)
        state = last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = current
            state = self._link[state]
        if state < 0:
            self._link[current] = 0
            return current
        target = self._next[state][token]
        if self._len[target] != self._len[state] + 1:
            target = self._split(target, state, token)
        self._link[current] = target
        return current

    def _split(self, state: int, before: int, token: int) -> int:
        clone = self._new_state(dict(self._next[state]), self._len[before] + 1, self._count[state])
        self._link[clone] = self._link[state]
        self._link[state] = clone
        while before >= 0 and self._next[before].get(token) == state:
            self._next[before][token] = clone
            before = self._link[before]
        return clone

    def _new_state(self, edges: dict[int, int], length: int, count: int) -> int:
        self._next.append(edges)
        self._len.append(length)
        self._count.append(count)
        self._link.append(0)
        return len(self._len) - 1

    def match(self, state: int, length: int, token: int, longest: int) -> tuple[int, int]:
        """The longest known suffix after one more token, up to `longest`: (state, its length)."""
        state = self._state_of(state, length)
        while state > 0 and token not in self._next[state]:
            state = self._link[state]
            length = self._len[state]
        after = self._next[state].get(token)
        return (0, 0) if after is None else (after, min(length + 1, longest))

    def earlier(self, state: int, length: int) -> tuple[int, int]:
        """The longest suffix of a match that is also followed by something."""
        state = self._state_of(state, length)
        while state > 0 and not self._next[state]:
            state = self._link[state]
            length = self._len[state]
        return state, length

    def _state_of(self, state: int, length: int) -> int:
        """The state of a match's last `length` tokens.

        It lies further up the suffix chain where the match was cut short, or where its state has
        been split since. A match grows by one token at a time, so this is constant on average.
        """
        while state > 0 and self._len[self._link[state]] >= length:
            state = self._link[state]
        return state

    def children(self, state: int, width: int) -> list[tuple[float, int, int]]:
        """The likeliest continuations: (share of the counts, token, state)."""
        edges = self._next[state]
        total = sum(self._count[after] for after in edges.values()) or 1
        ranked = sorted(edges.items(), key=lambda edge: -self._count[edge[1]])
        return [(self._count[after] / total, token, after) for token, after in ranked[:width]]


class SuffixDrafter(BaseDrafter):
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

    kind, title = "suffix", "Suffix lookup"
    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {"nodes": "max_nodes"}, ("nodes",), ("width",), varies=True
    )
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
