"""A tree grown by beams holds what a plain best-first search over the same candidates holds."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from lookup_steps import paths

from specdec.drafters.tree_growth import DynamicGrowth

VOCAB = 6


def random_law(seed, row):
    """A function path -> log-probabilities [V], random but fixed."""

    def law(path):
        draw = random.Random(f"{seed}-{row}-{path}")
        logits = torch.tensor([draw.gauss(0, 2) for _ in range(VOCAB)], dtype=torch.float64)
        return logits.log_softmax(-1)

    return law


def grow(laws, width, num_levels):
    """Grow a pool by laws, one a row; returns it and the paths that were expanded, row by row."""
    pool = DynamicGrowth(width, 1000, num_levels + 1, SimpleNamespace(is_plain=True))
    newest = [[()] for _ in laws]
    expanded = [list(row) for row in newest]
    for level in range(num_levels):
        if level:
            draft, rows = pool.expanded()
            newest = [row[-len(rows) :] for row in paths(draft)]
            expanded = [old + new for old, new in zip(expanded, newest, strict=True)]
        rows = zip(laws, newest, strict=True)
        pool.add_level(torch.stack([torch.stack([*map(law, row)]) for law, row in rows]))
    return pool, expanded


def best(pool, max_nodes, budgets):
    pool.max_nodes = max_nodes
    return paths(pool.draft(budgets))


def search(law, width, num_levels):
    """Every candidate's score by path, and the expanded paths: lists and sorting only."""
    candidates, beam, expanded = {}, {(): 0.0}, [()]
    for level in range(num_levels):
        found = {}
        for path, score in beam.items():
            ranked = sorted(enumerate(law(path).tolist()), key=lambda entry: -entry[1])
            found |= {(*path, token): score + value for token, value in ranked[:width]}
        candidates |= found
        beam = dict(sorted(found.items(), key=lambda entry: -entry[1])[:width])
        if level + 1 < num_levels:
            expanded += beam
    return candidates, expanded


@pytest.mark.parametrize(("width", "num_levels"), [(1, 3), (2, 4), (3, 3), (VOCAB + 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_nodes_by_cumulative_probability_are_kept(width, num_levels, seed):
    laws = [random_law(seed, row) for row in range(3)]
    pool, expanded = grow(laws, width, num_levels)
    budgets = [0, 4, 100]
    drafts = {size: best(pool, size, budgets) for size in (1, 3, 7, 1000)}
    for row, law in enumerate(laws):
        candidates, beams = search(law, width, num_levels)
        assert expanded[row] == beams
        ranked = sorted(candidates, key=lambda path: -candidates[path])
        for size, draft in drafts.items():
            limit = min(size, budgets[row])
            assert set(draft[row]) == set(ranked[:limit])
            assert len(draft[row]) == min(limit, len(candidates))


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_newest_beam_sees_ancestors_and_itself(num_levels):
    pool, _ = grow([random_law(3, row) for row in range(3)], 3, num_levels)
    tokens, visible, levels = pool.newest
    draft, rows = pool.expanded()
    for row, nodes in enumerate(paths(draft)):
        assert levels.tolist() == [len(path) - 1 for path in nodes]
        beam = nodes[-len(rows) :]
        assert tokens[row].tolist() == [path[-1] for path in beam]
        for seen, path in zip(visible[row].tolist(), beam, strict=True):
            assert seen == [path[: len(node)] == node for node in nodes]


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize(
    "levels",
    [
        [[0.25, 0.25, 0.25, 0.25]] * 4,  # all siblings are equal
        [[1.0, 0.0, 0.0, 0.0]] * 4,  # a child is as likely as its parent
        [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]],
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
    ],
)
def test_exact_ties_keep_pool_connected(levels, max_nodes):
    logs = [torch.tensor(level).log() for level in levels]
    pool, _ = grow([lambda path: logs[len(path)]] * 2, 3, len(levels))
    drafted = best(pool, max_nodes, [100, 2])
    for nodes, budget in zip(drafted, (max_nodes, min(max_nodes, 2)), strict=True):
        assert len(set(nodes)) == len(nodes), "a node that lost its parent became another's twin"
        chances = [[levels[depth][token] for depth, token in enumerate(path)] for path in nodes]
        assert all(map(all, chances)), "a path that cannot occur was kept"
        scores = [sum(map(math.log, path)) for path in chances]
        assert len(nodes) <= budget
        assert min(scores) >= best_scores(levels, 3, budget)[len(nodes) - 1] - 1e-6


def best_scores(levels, width, budget):
    """Scores of the best candidates, where a level's distribution is the same on every path."""
    beam, scores = [0.0], []
    for level in levels:
        above = sorted((math.log(p) for p in level if p), reverse=True)[:width]
        found = sorted((score + value for score in beam for value in above), reverse=True)
        scores += found
        beam = found[:width]
    return sorted(scores, reverse=True)[:budget]
