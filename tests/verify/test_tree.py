"""Tree helpers against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.verify import (
    ancestor_mask,
    ancestors,
    best_first,
    from_choices,
    node_depths,
    node_paths,
    path_tokens,
)

FAST = settings(max_examples=60, deadline=None)


@st.composite
def parent_lists(draw, max_nodes: int = 8):
    count = draw(st.integers(0, max_nodes))
    return [draw(st.integers(-1, node - 1)) for node in range(count)]


def _path(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*_path(parents, parents[node]), node]


@FAST
@given(parents=parent_lists())
def test_helpers_agree_with_walking_the_parents(parents):
    depth = len(parents)
    tensor = torch.tensor([parents], dtype=torch.long)
    tokens = torch.arange(100, 100 + depth).unsqueeze(0)
    depths = node_depths(tensor, depth)[0].tolist()
    paths, up = node_paths(tensor, depth)[0].tolist(), ancestors(tensor, depth)[0].tolist()
    words, mask = path_tokens(tokens, tensor, depth)[0].tolist(), ancestor_mask(tensor, depth)[0]
    for node in range(depth):
        expected = _path(parents, node)
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


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0,), (1, 0)], "not its parent"),
        ([(0,), (0,)], "twice"),
        ([()], "non-empty"),
        ([(-1,)], "ranks >= 0"),
    ],
)
def test_impossible_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        from_choices(choices)


@FAST
@given(data=st.data(), budget=st.integers(1, 10))
def test_best_first_keeps_a_connected_best_tree(data, budget):
    parents = data.draw(parent_lists())
    steps = [data.draw(st.sampled_from([0.0, 0.0, -0.5, -1.0])) for _ in parents]
    scores: list[float] = []
    for node, parent in enumerate(parents):
        scores.append(steps[node] + (scores[parent] if parent >= 0 else 0.0))
    selection = best_first(
        torch.tensor([scores]).view(1, -1), torch.tensor([parents], dtype=torch.long), budget
    )
    kept = selection.nodes[0].tolist()
    count = min(budget, len(parents))
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
