"""All substrings of a growing text in linear space, with what followed them how often."""

from collections.abc import Sequence


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
