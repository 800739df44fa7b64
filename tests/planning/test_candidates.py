"""Families, candidates and their shapes."""

import inspect
from dataclasses import replace

import pytest

from specdec.bench.config import ArmConfig
from specdec.common.compile import bucket
from specdec.drafters.base import DraftShape
from specdec.planning.candidates import Candidate, budget, chain, families
from specdec.planning.measure import get_drafter, sequence
from specdec.registry import DRAFTERS, load_drafter, strategy
from tests.tiny_heads import save_tiny_head
from tests.tiny_models import tiny_target

LOOKUP = ArmConfig(name="lookup", type="ngram", options={"num_draft_tokens": 6})
TREE = DraftShape(5, 2, 7, True)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def head(target, tmp_path_factory):
    return save_tiny_head(tmp_path_factory.mktemp("head"), "eagle3", target)


def arm(name, head, **options):
    return ArmConfig(name=name, type="eagle3", options={"path": head, **options})


def given(kind, options, shape):
    return Candidate("mine", kind, options, kind, shape)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_shape_options_are_options_of_their_class(kind):
    built = strategy(kind)
    accepted = inspect.signature(getattr(built, "load", built)).parameters
    rule = built.shape_options
    # Any static tree may be given by `choices` and `acceptance`, whatever the drafter takes.
    assert {*rule.names.values(), *rule.fixed} - {"choices", "acceptance"} <= set(accepted)


def test_arms_that_differ_in_shape_alone_are_one_drafter(target, head):
    arms = [
        arm("a", head, depth=2, width=1),
        arm("b", head, depth=3, width=2, max_nodes=5),
        arm("eagle3", head, depth=2, width=1, window=16),
        arm("eagle3 2", head, depth=2, width=1, window=32),
        LOOKUP,
    ]
    found = families(arms, target)
    names = [[c.name for c in family.given] for family in found]
    assert names == [["a", "b"], ["eagle3"], ["eagle3 2"], ["lookup"]]
    assert len({family.base.drafter for family in found}) == 4
    shapes = [c.shape for family in found for c in family.given]
    assert shapes == [chain(2), DraftShape(3, 2, 5, True), chain(2), chain(2), budget(6)]


def test_every_searched_shape_can_be_built(target, head):
    (family,) = families([arm("a", head, depth=2, width=1)], target)
    found = family.searched()
    assert found[0].name == "a"
    assert len({c.key for c in found}) == len(found)
    for candidate in found[1:]:
        drafter = load_drafter({"type": candidate.type, **candidate.options}, target)
        assert drafter.max_nodes == candidate.shape.nodes
        assert drafter.makes_trees == candidate.shape.is_tree


@pytest.mark.parametrize("options", [{"width": 1}, {"depth": 9, "width": 1, "max_nodes": 4}])
def test_a_given_shape_is_not_tried_again(target, head, options):
    """Options that were left out have defaults, so that one draft can be written in many ways."""
    (family,) = families([arm("mine", head, **options)], target)
    shapes = [c.shape for c in family.searched()]
    assert len(set(shapes)) == len(shapes)


def test_a_given_shape_beyond_those_timed_is_timed(target, head):
    arms = [
        arm("large", head, depth=5, width=8, max_nodes=59),
        arm("part of it", head, depth=5, width=8, max_nodes=40),
        arm("small", head, depth=2, width=1),
    ]
    (family,), (small,) = families(arms, target), families(arms[2:], target)
    more = [c.shape for c in family.timed()][len(small.timed()) :]
    assert more == [DraftShape(5, 8, 59, True)]


@pytest.mark.parametrize(
    ("kind", "options", "is_searched", "num_cuts"),
    [
        ("eagle3", {"depth": 3}, True, 7),
        ("eagle3", {"choices": [[0], [0, 0], [1]]}, False, 1),
        ("eagle3", {"children": "with_replacement"}, False, 7),
        ("hybrid", {"enough": 3}, False, 7),
    ],
)
def test_sampled_or_given_trees_are_planned_as_configured(kind, options, is_searched, num_cuts):
    mine = given(kind, options, TREE)
    assert mine.is_searched == is_searched
    assert len(mine.cuts()) == num_cuts
    assert mine.cuts()[-1] is mine


TREE_OPTIONS = {"depth": 4, "width": 3, "max_nodes": 9}
CHAIN_OPTIONS = {"num_draft_tokens": 4, "width": 1, "confidence_threshold": 0.3}


@pytest.mark.parametrize(
    ("kind", "shape", "options", "words"),
    [
        ("draft_model", chain(4, 0.3), CHAIN_OPTIONS, "chain 4 above 0.3"),
        ("eagle", DraftShape(4, 3, 9, True), TREE_OPTIONS, "tree 4x3 of 9"),
        ("suffix", budget(5), {"max_nodes": 5}, "5 nodes"),
    ],
)
def test_a_shape_becomes_options(kind, shape, options, words):
    found = given(kind, {"path": "demo"}, TREE).reshaped(shape)
    assert found.options == {"path": "demo", **options}
    assert found.name == f"{kind} {words}"


@pytest.mark.parametrize(
    ("kind", "options", "shape", "wanted"),
    [
        ("draft_model", {"num_draft_tokens": 6}, chain(6), {"num_draft_tokens": 3, "width": 1}),
        ("suffix", {}, budget(8), {"max_nodes": 3}),
        ("eagle", {"width": 2}, TREE, {"depth": 3, "max_nodes": 3}),
    ],
)
def test_a_draft_is_cut_by_its_options(kind, options, shape, wanted):
    (found,) = [c for c in given(kind, options, shape).cuts() if c.shape.nodes == 3]
    assert found.options == {**options, **wanted}


def test_a_shape_covers_its_parts_alone():
    tree = DraftShape(5, 3, 12, True)
    assert tree.covers(replace(tree, depth=4))
    for other in (replace(tree, depth=6), replace(tree, width=4), chain(5)):
        assert not tree.covers(other)
    assert chain(6).covers(chain(6, 0.4))
    assert not chain(6, 0.4).covers(chain(6))


@pytest.mark.parametrize("arms", [[], [ArmConfig(name="hf", type="hf_prompt_lookup")]])
def test_a_configuration_needs_a_drafter(target, arms):
    with pytest.raises(ValueError, match=r"holds no drafter to plan with.*\{type: ngram\}"):
        families(arms, target)


def test_plain_decoding_stands_around_every_few_runs(target):
    (family,) = families([LOOKUP], target)
    runs = sequence(family.timed())
    assert runs[0] is runs[-1] is None
    assert all(None in runs[place : place + 5] for place in range(len(runs) - 4))
    assert [run for run in runs if run] == family.timed()


def test_shapes_of_one_drafter_share_their_weights(target, head):
    (family,) = families([arm("a", head, depth=2, width=1)], target)
    built = {}
    first, second = (get_drafter(target, built, each) for each in family.timed()[:2])
    assert first is not second
    pairs = zip(first.head.parameters(), second.head.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_shapes_fill_the_buckets_of_graphs(target, monkeypatch):
    monkeypatch.setattr(target, "compile_mode", "graphs")
    (family,) = families([LOOKUP], target)
    shapes = [each.shape for each in family.searched() if not each.is_given]
    assert shapes
    assert all(bucket(shape.nodes + 1) == shape.nodes + 1 for shape in shapes)
    assert all(shape.depth == shape.nodes for shape in shapes if shape.depth)
