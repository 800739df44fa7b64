"""Tree helpers against plain Python, and the computed static tree against every one there is."""

from itertools import pairwise, product
from math import nan, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.verify import (
    ancestor_mask,
    ancestors,
    best_first,
    best_static_tree,
    delayed_tree,
    from_choices,
    node_depths,
    node_paths,
    path_tokens,
)

FAST = settings(max_examples=60, deadline=None)


@st.composite
def parent_lists(draw, max_nodes=8):
    count = draw(st.integers(0, max_nodes))
    return [draw(st.integers(-1, node - 1)) for node in range(count)]


def path_of(parents, node):
    return [] if node < 0 else [*path_of(parents, parents[node]), node]


@FAST
@given(parents=parent_lists())
def test_helpers_agree_with_walking_the_parents(parents):
    depth = len(parents)
    tensor = torch.tensor([parents], dtype=torch.long)
    tokens = torch.arange(100, 100 + depth).unsqueeze(0)
    depths, mask = node_depths(tensor, depth)[0].tolist(), ancestor_mask(tensor, depth)[0]
    paths, up = node_paths(tensor, depth)[0].tolist(), ancestors(tensor, depth)[0].tolist()
    words = path_tokens(tokens, tensor, depth)[0].tolist()
    for node in range(depth):
        expected = path_of(parents, node)
        padding = [-1] * (depth - len(expected))
        assert depths[node] == len(expected)
        assert paths[node] == expected + padding
        assert up[node] == expected[::-1] + padding
        assert words[node] == [100 + step for step in expected] + padding
        assert mask[node].nonzero().flatten().tolist() == expected


def test_choices_become_a_topological_tree_whatever_their_order():
    tree = from_choices([(1,), (0, 0), (0,), (0, 1), (1, 0), (0, 0, 0)])
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1, 2]
    assert tree.ranks.tolist() == [0, 1, 0, 1, 0, 0]
    assert tree.depths.tolist() == [1, 1, 2, 2, 2, 3]
    assert tree.depth == 3


def test_delayed_tree_is_a_stem_and_chains_below():
    tree = from_choices(delayed_tree(2, 3, 4))
    assert tree.parents.tolist() == [-1, 0, 1, 1, 1, 2, 3, 4]
    assert tree.ranks.tolist() == [0, 0, 0, 1, 2, 0, 0, 0]
    assert from_choices(delayed_tree(0, 2, 2)).parents.tolist() == [-1, -1, 0, 1]
    assert delayed_tree(3, 1, 5) == [(0,) * level for level in range(1, 6)]


@FAST
@given(data=st.data(), budget=st.integers(1, 10))
def test_best_first_keeps_a_connected_best_tree(data, budget):
    parents = data.draw(parent_lists())
    scores = []
    for parent in parents:
        step = data.draw(st.sampled_from([0.0, 0.0, -0.5, -1.0]))
        scores.append(step + (scores[parent] if parent >= 0 else 0.0))
    selection = best_first(
        torch.tensor([scores]).view(1, -1), torch.tensor([parents], dtype=torch.long), budget
    )
    kept, count = selection.nodes[0].tolist(), min(budget, len(parents))
    assert selection.lengths.tolist() == [count]
    assert kept == sorted(kept)
    best = sorted(scores, reverse=True)[:count]
    assert sorted((scores[node] for node in kept), reverse=True) == best
    for position, node in enumerate(kept):
        parent = selection.parents[0, position].item()
        assert parent < position
        assert (kept[parent] if parent >= 0 else -1) == parents[node]


def test_best_first_respects_candidates_and_budgets():
    scores = torch.tensor([[-1.0, -2.0, -torch.inf, -3.0], [-1.0, -1.0, -1.0, -1.0]])
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])
    selection = best_first(scores, parents, 4, row_budgets=torch.tensor([4, 2]))
    assert selection.nodes.tolist() == [[0, 1, 3, -1], [0, 1, -1, -1]]
    assert selection.parents.tolist() == [[-1, 0, 1, -1], [-1, 0, -1, -1]]
    assert selection.lengths.tolist() == [3, 2]


TABLES = {
    "falling ranks": [[0.6, 0.3], [0.5, 0.2], [0.4, 0.3]],
    "deep": [[0.9], [0.8, 0.1], [0.7], [0.6]],
    "ranks out of order": [[0.1, 0.5, 0.3], [0.2, 0.9], [0.7]],
    "certain and impossible": [[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]],
    "all equal": [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
    "nothing behind the first level": [[0.4, 0.3, 0.2], []],
    "two levels behind a gap": [[0.4, 0.3], [], [0.9]],
}


def connected_trees(nodes, size):
    """Every set of `size` nodes that holds the parent of each of them."""
    trees = {frozenset()}
    for _ in range(size):
        trees = {
            tree | {node}
            for tree in trees
            for node in nodes
            if node not in tree and (len(node) == 1 or node[:-1] in tree)
        }
    return trees


@pytest.mark.parametrize("name", TABLES)
def test_no_connected_tree_is_accepted_further(name):
    table = TABLES[name]
    nodes = [
        path
        for depth in range(1, len(table) + 1)
        for path in product(*(range(len(row)) for row in table[:depth]))
    ]
    worth = {path: prod(table[level][rank] for level, rank in enumerate(path)) for path in nodes}
    for size in range(1, min(5, len(nodes)) + 1):
        chosen = best_static_tree(table, size)
        assert len(set(chosen)) == len(chosen) == size
        best = max(sum(map(worth.get, tree)) for tree in connected_trees(nodes, size))
        assert sum(map(worth.get, chosen)) == pytest.approx(best)
        assert len(from_choices(chosen).parents) == size  # which refuses a node without its parent
    trees = [best_static_tree(table, size) for size in range(1, len(nodes) + 3)]
    for smaller, larger in pairwise(trees):
        assert larger[: len(smaller)] == smaller
    assert sorted(trees[-1]) == sorted(nodes)


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (from_choices, ([(0,), (1, 0)],), "not its parent"),
        (from_choices, ([(0,), (0,)],), "twice"),
        (from_choices, ([()],), "non-empty"),
        (from_choices, ([(-1,)],), "ranks >= 0"),
        (best_static_tree, ([[0.5]], 0), "num_nodes is 0 but must be at least 1"),
        (best_static_tree, ([], 3), "acceptance is empty"),
        (best_static_tree, ([[], [0.5]], 3), "acceptance is empty"),
        (best_static_tree, ([[0.5], [0.2, 1.5]], 3), r"\[1\] holds 1.5 .* within \[0, 1\]"),
        (best_static_tree, ([[-0.1]], 3), r"acceptance\[0\] holds -0.1"),
        (best_static_tree, ([[nan]], 3), r"acceptance\[0\] holds nan"),
    ],
)
def test_impossible_tree_is_refused(build, given, message):
    with pytest.raises(ValueError, match=message):
        build(*given)
