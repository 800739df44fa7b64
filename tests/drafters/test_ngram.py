"""Prompt lookup: which places are copied, in which order, and what that makes of the budget."""

import random

import pytest
from lookup_steps import begin, drafted, observe, paths, propose

from specdec.drafters.ngram import NgramDrafter


def expected_places(tokens, max_ngram, min_ngram, num_places):
    """Ends of earlier occurrences of the suffix: longest first, then most recent; a plain scan."""
    found = []
    for size in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :] and end not in found:
                found.append(end)
    return found[:num_places]


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ((1, 3), [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], [50]),  # the longest suffix decides
        ((1, 2), [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], [60]),
        ((3, 4, 1), [1, 2, 50, 7, 8, 2], [50, 7, 8]),
        ((3, 4, 2), [1, 2, 50, 7, 8, 2], []),  # no suffix is long enough
        ((2,), [1, 2, 50, 1, 2, 60, 1, 2], [60, 1]),  # the most recent match
        ((4, 4, 2), [5], []),  # the text is shorter than any suffix
        ((4, 4, 2), [5, 5], []),
    ],
)
def test_longest_then_most_recent_match_is_copied(options, tokens, expected):
    assert drafted(begin(NgramDrafter(*options), [tokens]), [5]) == [expected]


def test_root_is_part_of_suffix():
    drafter = begin(NgramDrafter(2), [[1, 2, 50, 51, 9, 1, 2]])
    assert drafted(drafter, [5]) == [[50, 51]]
    observe(drafter, [[50, 9]])  # the new root is 9, and (50, 9) is new
    assert drafted(drafter, [5]) == [[]]
    observe(drafter, [[1, 2]])
    assert drafted(drafter, [5]) == [[50, 9]]


def test_several_continuations_become_one_tree():
    tokens = [1, 2, 7, 8, 30, 1, 2, 7, 9, 31, 1, 2]
    drafter = begin(NgramDrafter(3, num_continuations=2), [tokens])
    assert paths(propose(drafter, [9])) == [[(7,), (7, 9), (7, 9, 31), (7, 8), (7, 8, 30)]]
    tree = begin(NgramDrafter(4, num_continuations=2, max_nodes=3), [tokens] * 2)
    assert propose(tree, [2, 9]).lengths.tolist() == [2, 3]
    # (8, 1, 2) was followed by 50; (1, 2) by 50 at the same place, and by 60 before that.
    tokens = [1, 2, 60, 8, 1, 2, 50, 8, 1, 2]
    drafter = begin(NgramDrafter(1, max_ngram=3, num_continuations=2), [tokens])
    assert paths(propose(drafter, [9])) == [[(50,), (60,)]]


@pytest.mark.parametrize("num_continuations", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_drafts_equal_scan_of_whole_text(seed, num_continuations):
    draw = random.Random(seed)
    tokens = [draw.randrange(4) for _ in range(6)]
    options = {"num_draft_tokens": 4, "max_ngram": 5, "num_continuations": num_continuations}
    drafter = begin(NgramDrafter(**options), [tokens])
    for _ in range(60):
        places = expected_places(tokens, 5, 2, num_continuations)
        copies = [tokens[end : end + 4] for end in places]
        expected = {tuple(copy[:n]) for copy in copies for n in range(1, len(copy) + 1)}
        found = paths(propose(drafter, [100]))[0]
        assert set(found) == expected
        assert len(found) == len(expected), "a node is drafted twice"
        rebuilt = begin(NgramDrafter(**options), [tokens])
        assert paths(propose(rebuilt, [100]))[0] == found
        new = [draw.randrange(4) for _ in range(draw.randint(1, 4))]
        tokens = tokens + new
        observe(drafter, [new])


def test_a_new_batch_forgets_the_one_before():
    drafter = begin(NgramDrafter(1), [[1, 2, 50, 9, 1, 2]])
    assert drafted(begin(drafter, [[9, 1, 2]]), [5]) == [[]]
