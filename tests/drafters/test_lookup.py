"""Lookup drafters: texts become one padded draft, and rows keep to themselves."""

import random
from functools import partial

import pytest
import torch
from lookup_steps import begin, drafted, observe, paths, propose

from specdec.drafters.lookup import pack_rows
from specdec.drafters.ngram import NgramDrafter, merge
from specdec.drafters.suffix import SuffixDrafter
from specdec.verify.tree import node_depths

CPU = torch.device("cpu")


def nodes_of(*pairs):
    """Nodes from (parent, token), of falling confidence."""
    return [(*pair, 0.5 ** (1 + at)) for at, pair in enumerate(pairs)]


RAGGED = [nodes_of((-1, 5), (-1, 6), (0, 7), (2, 8)), nodes_of((-1, 9)), []]


def test_ragged_rows_are_padded_behind_their_lengths():
    chain = pack_rows(
        [nodes_of((-1, 5), (0, 6), (1, 7)), [], nodes_of((-1, 8))], CPU, as_chain=True
    )
    assert chain.tokens.tolist() == [[5, 6, 7], [-1, -1, -1], [8, -1, -1]]
    assert chain.confidence.tolist() == [[0.5, 0.25, 0.125], [0, 0, 0], [0.5, 0, 0]]
    assert (chain.depth, chain.probs, chain.tokens.dtype) == (3, None, torch.int64)
    tree = pack_rows(RAGGED, CPU, as_chain=False)
    assert paths(tree) == [[(5,), (6,), (5, 7), (5, 7, 8)], [(9,)], []]
    assert tree.tokens.tolist()[1:] == [[9, -1, -1, -1], [-1] * 4]
    assert tree.parents.tolist() == [[-1, -1, 0, 2], [-1] * 4, [-1] * 4]
    assert tree.confidence.tolist()[1] == [0.5, 0, 0, 0]
    assert (tree.depth, tree.lengths.tolist()) == (3, [4, 1, 0])
    for as_chain in (True, False):
        empty = pack_rows([[], []], CPU, as_chain=as_chain)
        assert (empty.lengths.tolist(), empty.num_nodes, empty.depth) == ([0, 0], 0, 0)


def joined(continuations, budget):
    """Parents and tokens, from continuations of equally long matches."""
    return [node[:2] for node in merge([(3, each) for each in continuations], budget)]


@pytest.mark.parametrize(
    ("continuations", "budget", "nodes"),
    [
        ([[1, 2, 3], [1, 2, 4], [5], [1]], 9, [(-1, 1), (0, 2), (1, 3), (1, 4), (-1, 5)]),
        ([[1, 2, 3], [1, 4], [5]], 4, [(-1, 1), (0, 2), (1, 3), (0, 4)]),
        ([[1, 2, 3], [1, 4], [5]], 2, [(-1, 1), (0, 2)]),
        ([[1, 2, 3], [1, 4], [5]], 0, []),
        ([], 3, []),
    ],
)
def test_equal_beginnings_are_joined_first_come_first(continuations, budget, nodes):
    assert joined(continuations, budget) == nodes


def test_confidence_grows_with_match_and_falls_along_path():
    assert merge([(4, [1, 2, 3]), (2, [1, 5]), (1, [6])], 9) == [
        *((-1, 1, 4 / 5), (0, 2, 4 / 6), (1, 3, 4 / 7), (0, 5, 2 / 4), (-1, 6, 1 / 2)),
    ]
    assert merge([(1, [1]), (9, [1, 2])], 9) == [(-1, 1, 1 / 2), (0, 2, 1 / 2)]


@pytest.mark.parametrize("seed", range(5))
def test_merged_tree_holds_every_prefix_once(seed):
    draw = random.Random(seed)
    continuations = [[draw.randrange(3) for _ in range(draw.randrange(6))] for _ in range(8)]
    nodes = merge([(3, each) for each in continuations], 1000)
    assert all(parent < index for index, (parent, *_) in enumerate(nodes))
    prefixes = {tuple(c[:n]) for c in continuations for n in range(1, len(c) + 1)}
    draft = pack_rows([nodes], CPU, as_chain=False)
    assert sorted(paths(draft)[0]) == sorted(prefixes)
    assert draft.depth == node_depths(draft.parents, draft.num_nodes).max()
    for budget in range(len(nodes)):
        assert joined(continuations, budget) == [node[:2] for node in nodes[:budget]]


LOOKUPS = [NgramDrafter, partial(SuffixDrafter, num_remembered=0)]


@pytest.mark.parametrize("make", LOOKUPS)
def test_every_row_keeps_its_budget(make):
    tokens = [1, 2, 7, 8, 9, 10, 1, 2]
    drafter = begin(make(4), [tokens] * 3)
    assert drafted(drafter, [0, 2, 9]) == [[], [7, 8], [7, 8, 9, 10]]
    assert propose(drafter, [0, 0, 0]).num_nodes == 0


@pytest.mark.parametrize("make", LOOKUPS)
def test_rows_keep_their_own_texts(make):
    drafter = begin(make(1), [[1, 2, token, 9, 1, 2] for token in (50, 60, 70)] + [[3, 4, 1, 2]])
    assert drafted(drafter, [5] * 4) == [[50], [60], [70], []]
    drafter.reorder(torch.tensor([0, 2]))
    assert drafted(drafter, [5, 5]) == [[50], [70]]
    begin(drafter, [[1, 2, 80, 9, 1, 2]], join=True)
    assert drafted(drafter, [5] * 3) == [[50], [70], [80]]
    observe(drafter, [[50], [8], [80]])
    assert drafted(drafter, [5] * 3) == [[9], [], [9]]
