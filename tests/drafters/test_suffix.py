"""Suffix lookup: the automaton's counts, what is drafted from them, what is remembered."""

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_steps import begin, drafted, observe, paths, propose

from specdec.drafters.suffix import SuffixAutomaton, SuffixDrafter

ALPHABET = range(3)
TEXTS = st.lists(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=25), max_size=3)


def occurrences(texts, word):
    """How often a word occurs, overlaps included; a plain scan."""
    size = len(word)
    return sum(
        tuple(text[start : start + size]) == tuple(word)
        for text in texts
        for start in range(len(text) - size + 1)
    )


def shares(texts, word):
    """Share of every token among those that followed a word."""
    counts = {token: occurrences(texts, (*word, token)) for token in ALPHABET}
    total = sum(counts.values())
    return {token: count / (total or 1) for token, count in counts.items() if count}


def known_shares(automaton, state):
    return {token: share for share, token, _ in automaton.children(state, 9)}


def automaton_of(texts):
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.add(text)
    return automaton


def follow(automaton, word, longest=100):
    state, length = 0, 0
    for token in word:
        state, length = automaton.match(state, length, token, longest)
    return state, length


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_automaton_counts_what_followed_every_word(texts):
    automaton = automaton_of(texts)
    for word in (word for size in (1, 2, 3, 4) for word in product(ALPHABET, repeat=size)):
        state, length = follow(automaton, word)
        known = next(n for n in range(len(word), -1, -1) if occurrences(texts, word[-n:]) or not n)
        assert length == known
        if known:
            expected = shares(texts, word[-known:])
            assert known_shares(automaton, state) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(
    TEXTS,
    TEXTS,
    st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=6),
    st.sampled_from([1, 2, 3, 4, 100]),
)
def test_held_match_survives_added_texts(before, later, word, longest):
    automaton = automaton_of(before)
    _, held = match = follow(automaton, word, longest)
    assert held <= longest
    for text in later:
        automaton.add(text)
    state, length = automaton.earlier(*match)
    texts = [*before, *later]
    followed = [n for n in range(held, 0, -1) if shares(texts, word[-n:])]
    assert length == (followed[0] if followed else 0)
    if length:
        expected = shares(texts, word[-length:])
        assert known_shares(automaton, state) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["random", "periodic", "constant", "new"])
def test_states_and_edges_grow_linearly_with_the_text(kind):
    draw = random.Random(0)
    size = 600
    texts = {
        "random": [draw.randrange(4) for _ in range(size)],
        "periodic": [0, 1, 2] * (size // 3),
        "constant": [7] * size,
        "new": list(range(size)),
    }
    automaton = automaton_of([texts[kind]])
    assert len(automaton._link) <= 2 * size
    assert sum(map(len, automaton._next)) <= 3 * size


def check_chain(chain, texts, tokens, limits):
    """A chain takes the commonest continuation of the longest suffix, as far as it may."""
    max_nodes, max_match, min_match, min_probability, factor = limits
    sizes = range(min(max_match, len(tokens)), 0, -1)
    known = [n for n in sizes if shares(texts, tokens[-n:])]
    if not known or known[0] < min_match:
        assert chain == []
        return
    word, probability = tokens[-known[0] :], 1.0
    for token in chain:
        following = shares(texts, word)
        assert following[token] == max(following.values())
        probability *= following[token]
        word = [*word, token]
    assert not chain or probability >= min_probability
    levels = max(1, int(factor * known[0]))
    assert len(chain) <= min(max_nodes, levels)
    if len(chain) < min(max_nodes, levels) and shares(texts, word):
        assert probability * max(shares(texts, word).values()) < min_probability


@pytest.mark.parametrize("seed", range(4))
def test_longest_suffix_is_continued_by_commonest_token(seed):
    draw = random.Random(seed)
    limits = (5, draw.choice([2, 3, 32]), 2, 0.2, draw.choice([0.5, 2.0]))
    tokens = [draw.choice(ALPHABET) for _ in range(4)]
    drafter = begin(SuffixDrafter(*limits), [tokens])
    for _ in range(12):
        chain = drafted(drafter, [9])[0]
        check_chain(chain, [tokens], tokens, limits)
        assert drafted(begin(SuffixDrafter(*limits), [tokens]), [9])[0] == chain
        new = [draw.choice(ALPHABET) for _ in range(draw.randint(1, 4))]
        tokens = tokens + new
        observe(drafter, [new])


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({"max_match": 3}, [1, 2, 3, 9, 4, 2, 3, 8, 5, 2, 3, 8, 1, 2, 3], [9]),
        ({"max_match": 2}, [1, 2, 3, 9, 4, 2, 3, 8, 5, 2, 3, 8, 1, 2, 3], [8]),
        ({"min_match": 2}, [1, 2, 8, 1, 2, 9, 5, 2], []),
        ({"min_match": 1}, [1, 2, 8, 1, 2, 9, 5, 2], [8]),
        ({"min_match": 1, "min_probability": 0.6}, [1, 2, 8, 1, 2, 9, 5, 2], []),
    ],
)
def test_limits_of_match_and_probability_hold(options, tokens, expected):
    assert drafted(begin(SuffixDrafter(1, **options), [tokens]), [5]) == [expected]


def test_tree_holds_likeliest_paths():
    # (1, 2) was followed by 3 twice and by 4 once; each of them by other tokens.
    tokens = [1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 4, 7, 1, 2]
    drafter = begin(SuffixDrafter(4, width=2, min_probability=0.3), [tokens])
    nodes = paths(propose(drafter, [9]))[0]
    assert sorted(nodes) == [(3,), (3, 5), (3, 6), (4,)]
    assert nodes[0] == (3,), "the likeliest comes first"
    assert paths(propose(drafter, [1])) == [[(3,)]]


def finished(drafter, *outputs):
    """Run batches of one row that emit `outputs`, one after the other."""
    for output in outputs:
        begin(drafter, [[99, output[0]]])
        observe(drafter, [output[1:]])
    return drafter


def test_earlier_outputs_are_drafted_from():
    drafter = SuffixDrafter(2)
    begin(drafter, [[40, 41, 42, 1]])
    observe(drafter, [[2, 3, 4]])
    begin(drafter, [[60, 1, 2], [60, 40, 41]])
    assert drafted(drafter, [5, 5]) == [[3, 4], []]


def test_longer_match_drafts_and_own_wins_ties():
    drafter = finished(SuffixDrafter(1), [1, 2, 3, 70])
    own = [2, 3, 80, 9, 2, 3]
    begin(drafter, [own, [*own[:-2], 1, 2, 3]])
    assert drafted(drafter, [5, 5]) == [[80], [70]]


def test_nothing_continues_across_past_outputs_or_is_kept_for_nobody():
    drafter = finished(SuffixDrafter(2), [1, 2], [3, 4])
    assert drafted(begin(drafter, [[1, 2]]), [5]) == [[]]
    drafter = finished(SuffixDrafter(2, num_remembered=0), [1, 2, 3, 4])
    assert drafted(begin(drafter, [[60, 1, 2]]), [5]) == [[]]


def test_leaving_row_is_remembered():
    drafter = finished(SuffixDrafter(1), [1, 2, 3, 9])
    begin(drafter, [[4, 7], [5], [6]])
    observe(drafter, [[2, 3], [2, 3, 8], [2, 3, 8]])
    assert drafted(drafter, [5, 5, 5])[0] == [9]
    drafter.reorder(torch.tensor([0]))
    assert drafted(drafter, [5]) == [[8]], "(2, 3) was followed by 8 twice and by 9 once"


@pytest.mark.parametrize("num_remembered", [1, 2, 3, 8])
def test_newest_outputs_are_remembered(num_remembered):
    drafter = SuffixDrafter(1, num_remembered=num_remembered)
    outputs = [[100 + 3 * i, 101 + 3 * i, 102 + 3 * i] for i in range(20)]
    for count in range(1, len(outputs) + 1):
        finished(drafter, outputs[count - 1])
        begin(drafter, [[98], *([60, *output[:2]] for output in outputs)])
        known = [bool(draft) for draft in drafted(drafter, [0, *[1] * len(outputs)])][1:]
        oldest = known.index(True)
        assert known == [oldest <= i < count for i in range(len(outputs))]
        assert count - oldest <= num_remembered
        drafter._rows = []  # the questions asked here are not to be remembered


def test_memory_of_past_outputs_stays_bounded():
    drafter = SuffixDrafter(num_remembered=4)
    draw = random.Random(0)
    for _ in range(50):
        finished(drafter, [draw.randrange(9) for _ in range(10)])
    assert len(drafter._shared._link) <= 2 * 4 * 10
    assert sum(map(len, drafter._past)) <= 4 * 10
