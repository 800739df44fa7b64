"""Suffix lookup: continue the longest suffix seen before, by how often each token followed."""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import ClassVar

from specdec.common.arguments import require_counts
from specdec.drafters.base import ShapeOptions
from specdec.drafters.lookup import LookupDrafter, Node, match_confidence


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
        self._link, self._len, self._count = [-1], [0], [0]
        self._last = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Add a separate text: nothing continues across its borders."""
        self._last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token to the current text."""
        last = self._last
        if token in self._next[last]:
            # A text that begins as another did: reuse or split its state.
            current = self._after(last, token)
        else:
            current, state = self._new_state({}, self._len[last] + 1, 0), last
            while state >= 0 and token not in self._next[state]:
                self._next[state][token] = current
                state = self._link[state]
            self._link[current] = self._after(state, token) if state >= 0 else 0
        self._last = current
        for _ in range(self._MAX_CHAIN):
            if current <= 0:
                break
            self._count[current] += 1
            current = self._link[current]

    def _after(self, before: int, token: int) -> int:
        """The state of exactly what ends in `before` and a token, split off where it has none."""
        state = self._next[before][token]
        if self._len[state] == self._len[before] + 1:
            return state
        clone = self._new_state(dict(self._next[state]), self._len[before] + 1, self._count[state])
        self._link[clone], self._link[state] = self._link[state], clone
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
        state, length = self._suffix(state, length, lambda edges: token in edges)
        after = self._next[state].get(token)
        return (0, 0) if after is None else (after, min(length + 1, longest))

    def earlier(self, state: int, length: int) -> tuple[int, int]:
        """The longest suffix of a match that is also followed by something."""
        return self._suffix(state, length, bool)

    def _suffix(
        self, state: int, length: int, fits: Callable[[dict[int, int]], bool]
    ) -> tuple[int, int]:
        """The longest suffix of a match whose continuations fit.

        The state of its last `length` tokens lies further up the suffix chain where the match was
        cut short, or where its state has been split since. A match grows by one token at a time, so
        this is constant on average.
        """
        while state > 0 and self._len[self._link[state]] >= length:
            state = self._link[state]
        while state > 0 and not fits(self._next[state]):
            state = self._link[state]
            length = self._len[state]
        return state, length

    def children(self, state: int, width: int) -> list[tuple[float, int, int]]:
        """The likeliest continuations: (share of the counts, token, state)."""
        edges = self._next[state]
        total = sum(self._count[after] for after in edges.values()) or 1
        ranked = sorted(edges.items(), key=lambda edge: -self._count[edge[1]])
        return [(self._count[after] / total, token, after) for token, after in ranked[:width]]


class SuffixDrafter(LookupDrafter):
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
        super().__init__(max_nodes, makes_trees=width > 1)
        self.max_match, self.min_match, self.width = max_match, min_match, width
        self.min_probability, self.factor = min_probability, factor
        self.num_remembered = num_remembered
        self._past: list[list[int]] = []
        self._shared = SuffixAutomaton()

    def _begin(self, prompt: Sequence[int]) -> "_Row":
        return _Row(self, prompt, self._shared)

    def _leave(self, rows: Sequence["_Row"]) -> None:
        """Let their outputs join the past ones."""
        for row in rows:
            self._past.append(row.output)
            if len(self._past) <= self.num_remembered:
                self._shared.add(row.output)
                continue
            # An automaton cannot forget: rebuild it from half of the past now and then.
            del self._past[: 1 + self.num_remembered // 2]
            self._shared = SuffixAutomaton()
            for output in self._past:
                self._shared.add(output)


class _Row:
    """One row: its text as an automaton, and where it stands in both automata."""

    def __init__(
        self, limits: SuffixDrafter, prompt: Sequence[int], shared: SuffixAutomaton
    ) -> None:
        self._limits, self._own, self._shared = limits, SuffixAutomaton(), shared
        self._own_match = self._shared_match = (0, 0)
        self.output: list[int] = []
        self.extend(prompt)
        self.output = [prompt[-1]]

    def extend(self, tokens: Sequence[int]) -> None:
        self.output.extend(tokens)
        longest = self._limits.max_match
        for token in tokens:
            # Matched before it is added, so that the text does not match itself.
            self._own_match = self._own.match(*self._own_match, token, longest)
            self._own.append(token)
            self._shared_match = self._shared.match(*self._shared_match, token, longest)

    def draft(self, budget: int) -> list[Node]:
        limits = self._limits
        own = (self._own, *self._own.earlier(*self._own_match))
        shared = (self._shared, *self._shared.earlier(*self._shared_match))
        automaton, state, length = max(own, shared, key=lambda found: found[2])
        if length < limits.min_match:
            return []
        levels, order = max(1, int(limits.factor * length)), count()
        nodes: list[Node] = []
        # Candidates: minus the probability, when found, parent, token, state and level.
        queue: list[tuple[float, int, int, int, int, int]] = []
        node, probability, level = -1, 1.0, 0
        while len(nodes) < budget:
            children = automaton.children(state, limits.width) if level < levels else ()
            for share, token, after in children:
                if probability * share >= limits.min_probability:
                    entry = (-probability * share, next(order), node, token, after, level + 1)
                    heappush(queue, entry)
            if not queue:
                break
            negative, _, parent, token, state, level = heappop(queue)
            nodes.append((parent, token, -negative * match_confidence(length, level)))
            node, probability = len(nodes) - 1, -negative
        return nodes
