"""Lookup drafters: texts become one padded draft, and rows keep to themselves."""

import random
from functools import partial

import pytest
import torch
from lookup_steps import begin, chains, drafted, observe, paths, propose

from specdec.drafters.lookup import merge, pack_rows
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.verify.tree import node_depths

CPU = torch.device("cpu")


def test_ragged_chains_are_padded_behind_their_lengths():
    draft = pack_rows([[(-1, 5), (0, 6), (1, 7)], [], [(-1, 8)]], CPU, as_chain=True)
    assert chains(draft) == [[5, 6, 7], [], [8]]
    assert draft.tokens.tolist() == [[5, 6, 7], [-1, -1, -1], [8, -1, -1]]
    assert (draft.depth, draft.probs, draft.tokens.dtype) == (3, None, torch.int64)


def test_ragged_trees_keep_parents_and_depth():
    rows = [[(-1, 5), (-1, 6), (0, 7), (2, 8)], [(-1, 9)], []]
    draft = pack_rows(rows, CPU, as_chain=False)
    assert paths(draft) == [[(5,), (6,), (5, 7), (5, 7, 8)], [(9,)], []]
    assert draft.tokens.tolist()[1:] == [[9, -1, -1, -1], [-1] * 4]
    assert draft.parents.tolist() == [[-1, -1, 0, 2], [-1] * 4, [-1] * 4]
    assert draft.depth == 3
    assert draft.lengths.tolist() == [4, 1, 0]


@pytest.mark.parametrize("as_chain", [True, False])
def test_rows_without_nodes_make_an_empty_draft(as_chain):
    draft = pack_rows([[], []], CPU, as_chain=as_chain)
    assert (draft.batch_size, draft.num_nodes, draft.depth) == (2, 0, 0)
    assert draft.lengths.tolist() == [0, 0]


def test_confidences_are_zero_on_padding():
    rows, confidences = [[(-1, 5), (0, 6)], [], [(-1, 8)]], [[0.5, 0.25], [], [0.75]]
    for as_chain in (True, False):
        draft = pack_rows(rows, CPU, as_chain=as_chain, confidences=confidences)
        assert draft.confidence.tolist() == [[0.5, 0.25], [0, 0], [0.75, 0]]
    assert pack_rows(rows, CPU, as_chain=True).confidence is None


def joined(continuations, budget):
    """Nodes only, from continuations of equally long matches."""
    return merge([(3, continuation) for continuation in continuations], budget)[0]


def test_equal_beginnings_are_joined():
    paths = [[1, 2, 3], [1, 2, 4], [5], [1]]
    assert joined(paths, 9) == [(-1, 1), (0, 2), (1, 3), (1, 4), (-1, 5)]


def test_confidence_grows_with_match_and_falls_along_path():
    nodes, confidences = merge([(4, [1, 2, 3]), (2, [1, 5]), (1, [6])], 9)
    assert nodes == [(-1, 1), (0, 2), (1, 3), (0, 5), (-1, 6)]
    assert confidences == [4 / 5, 4 / 6, 4 / 7, 2 / 4, 1 / 2]
    assert merge([(1, [1]), (9, [1, 2])], 9)[1] == [1 / 2, 1 / 2]


def test_earlier_continuations_take_budget_first():
    continuations = [[1, 2, 3], [1, 4], [5]]
    assert joined(continuations, 4) == [(-1, 1), (0, 2), (1, 3), (0, 4)]
    assert joined(continuations, 2) == [(-1, 1), (0, 2)]
    assert joined(continuations, 0) == []
    assert joined([], 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_merged_tree_holds_every_prefix_once(seed):
    draw = random.Random(seed)
    continuations = [[draw.randrange(3) for _ in range(draw.randrange(6))] for _ in range(8)]
    nodes = joined(continuations, 1000)
    assert all(parent < index for index, (parent, _) in enumerate(nodes))
    prefixes = {tuple(c[:n]) for c in continuations for n in range(1, len(c) + 1)}
    draft = pack_rows([nodes], CPU, as_chain=False)
    assert sorted(paths(draft)[0]) == sorted(prefixes)
    assert draft.depth == node_depths(draft.parents, draft.num_nodes).max()
    for budget in range(len(nodes)):
        assert joined(continuations, budget) == nodes[:budget]


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
