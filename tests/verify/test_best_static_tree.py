"""The computed static tree against every connected tree there is."""

from itertools import pairwise, product
from math import nan, prod

import pytest

from specdec.verify import best_static_tree, from_choices

TABLES = {
    "falling ranks": [[0.6, 0.3], [0.5, 0.2], [0.4, 0.3]],
    "deep": [[0.9], [0.8, 0.1], [0.7], [0.6]],
    "ranks out of order": [[0.1, 0.5, 0.3], [0.2, 0.9], [0.7]],
    "certain and impossible": [[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]],
    "all equal": [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
    "nothing behind the first level": [[0.4, 0.3, 0.2], []],
    "two levels behind a gap": [[0.4, 0.3], [], [0.9]],
}


def all_nodes(table):
    """Every path that the table has candidates for."""
    return [
        path
        for depth in range(1, len(table) + 1)
        for path in product(*(range(len(row)) for row in table[:depth]))
    ]


def worth(path, table):
    return prod(table[level][rank] for level, rank in enumerate(path))


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
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_no_connected_tree_is_accepted_further(name, size):
    table = TABLES[name]
    nodes = all_nodes(table)
    size = min(size, len(nodes))
    best = max(sum(worth(node, table) for node in tree) for tree in connected_trees(nodes, size))
    chosen = best_static_tree(table, size)
    assert len(set(chosen)) == len(chosen) == size
    assert set(chosen) <= set(nodes)
    assert sum(worth(node, table) for node in chosen) == pytest.approx(best)
    tree = from_choices(chosen)  # which refuses a node without its parent
    assert len(tree.parents) == size


@pytest.mark.parametrize("name", TABLES)
def test_larger_budget_adds_to_the_tree(name):
    table = TABLES[name]
    nodes = all_nodes(table)
    trees = [best_static_tree(table, size) for size in range(1, len(nodes) + 3)]
    for smaller, larger in pairwise(trees):
        assert larger[: len(smaller)] == smaller
    assert sorted(trees[-1]) == sorted(nodes)


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        ([[0.5]], 0, "num_nodes is 0 but must be at least 1"),
        ([], 3, "acceptance is empty"),
        ([[], [0.5]], 3, "acceptance is empty"),
        ([[0.5], [0.2, 1.5]], 3, r"acceptance\[1\] holds 1.5 but must be within \[0, 1\]"),
        ([[-0.1]], 3, r"acceptance\[0\] holds -0.1"),
        ([[nan]], 3, r"acceptance\[0\] holds nan"),
    ],
)
def test_unusable_table_is_refused(table, size, message):
    with pytest.raises(ValueError, match=message):
        best_static_tree(table, size)
