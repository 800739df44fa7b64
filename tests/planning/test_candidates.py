"""Families, candidates and their shapes."""

import inspect
from itertools import pairwise

import pytest

from specdec.bench.config import ArmConfig
from specdec.drafters.base import DraftShape, ShapeOptions
from specdec.planning.candidates import Candidate, chain, families, is_searched, to_options
from specdec.planning.times import Drafters, sequence
from specdec.registry import DRAFTERS, load_drafter, strategy
from tests.tiny_heads import save_tiny_head
from tests.tiny_models import tiny_target

LOOKUP = ArmConfig(name="lookup", type="ngram", options={"num_draft_tokens": 6})


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def head(target, tmp_path_factory):
    return save_tiny_head(tmp_path_factory.mktemp("head"), "eagle3", target)


def arm(name, head, **options):
    return ArmConfig(name=name, type="eagle3", options={"path": head, **options})


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
        arm("c", head, depth=2, width=1, window=16),
        LOOKUP,
    ]
    found = families(arms, target)
    assert [[c.name for c in family.given] for family in found] == [["a", "b"], ["c"], ["lookup"]]
    assert len({family.name for family in found}) == 3
    shapes = [c.shape for family in found for c in family.given]
    wanted = [chain(2), DraftShape(3, 2, 5, True), chain(2), DraftShape(0, 1, 6, False)]
    assert shapes == wanted


def test_every_searched_shape_can_be_built(target, head):
    (family,) = families([arm("a", head, depth=2, width=1)], target)
    found = family.searched()
    assert found[0].name == "a"
    assert len({repr(sorted(c.options.items())) for c in found}) == len(found)
    for candidate in found[1:]:
        drafter = load_drafter({"type": candidate.type, **candidate.options}, target)
        assert drafter.max_nodes == candidate.shape.nodes
        assert drafter.makes_trees == candidate.shape.is_tree


def test_a_given_shape_is_not_tried_again(target, head):
    """Options that were left out have defaults, so that one draft can be written in many ways."""
    for options in ({"width": 1}, {"depth": 9, "width": 1, "max_nodes": 4}):
        (family,) = families([arm("mine", head, **options)], target)
        shapes = [c.shape for c in family.searched()]
        assert len(set(shapes)) == len(shapes)


def test_drafters_of_one_type_have_different_names(target, head):
    arms = [
        arm("a", head, width=1),
        arm("eagle3", head, width=1, window=16),
        arm("eagle3 2", head, width=1, window=32),
    ]
    assert len({family.name for family in families(arms, target)}) == 3


def test_a_given_shape_beyond_those_timed_is_timed(target, head):
    arms = [
        arm("large", head, depth=5, width=8, max_nodes=59),
        arm("part of it", head, depth=5, width=8, max_nodes=40),
        arm("small", head, depth=2, width=1),
    ]
    (family,) = families(arms, target)
    (small,) = families(arms[2:], target)
    more = [c.shape for c in family.timed()][len(small.timed()) :]
    assert more == [DraftShape(5, 8, 59, True)]


def test_sampled_or_given_trees_are_planned_as_configured():
    rule = strategy("eagle3").shape_options
    assert is_searched(rule, {"depth": 3})
    assert not is_searched(rule, {"choices": [[0]]})
    assert not is_searched(rule, {"children": "with_replacement"})
    assert not is_searched(ShapeOptions({}, varies=True), {"power": 3})


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (
            "draft_model",
            chain(4, 0.3),
            {"num_draft_tokens": 4, "width": 1, "confidence_threshold": 0.3},
        ),
        ("eagle", DraftShape(4, 3, 9, True), {"depth": 4, "width": 3, "max_nodes": 9}),
        ("suffix", DraftShape(0, 1, 5, False), {"max_nodes": 5}),
    ],
)
def test_a_shape_becomes_options(kind, shape, options):
    assert to_options(strategy(kind).shape_options.names, shape) == options


@pytest.mark.parametrize(
    ("kind", "options", "shape", "nodes", "wanted"),
    [
        ("draft_model", {"num_draft_tokens": 6}, chain(6), 2, {"num_draft_tokens": 2}),
        ("suffix", {}, DraftShape(0, 1, 8, False), 3, {"max_nodes": 3}),
        ("eagle", {"width": 2}, DraftShape(5, 2, 7, True), 3, {"depth": 3, "max_nodes": 3}),
        ("eagle", {"width": 2}, DraftShape(5, 2, 7, True), 7, {}),
    ],
)
def test_a_draft_is_cut_by_its_options(kind, options, shape, nodes, wanted):
    given = Candidate("mine", kind, options, kind, shape)
    (found,) = [each for each in given.cuts() if each.shape.nodes == nodes]
    assert found.options == {**options, **wanted}


@pytest.mark.parametrize(
    ("kind", "options"), [("hybrid", {"enough": 3}), ("eagle", {"choices": [[0], [0, 0], [1]]})]
)
def test_a_draft_without_such_options_is_not_cut(kind, options):
    given = Candidate("mine", kind, options, kind, DraftShape(2, 2, 3, True))
    assert [each.options for each in given.cuts()][-1:] == [options]
    assert len(list(given.cuts())) == (1 if kind == "eagle" else 3)


def test_a_shape_covers_its_parts_alone():
    tree = DraftShape(5, 3, 12, True)
    assert tree.covers(DraftShape(4, 3, 12, True))
    assert not tree.covers(DraftShape(6, 3, 12, True))
    assert not tree.covers(DraftShape(5, 4, 12, True))
    assert not tree.covers(chain(5))
    assert chain(6).covers(chain(6, 0.4))
    assert not chain(6, 0.4).covers(chain(6))


def test_a_configuration_needs_a_drafter(target):
    for arms in ([], [ArmConfig(name="hf", type="hf_prompt_lookup")]):
        with pytest.raises(ValueError, match="holds no drafter to plan with"):
            families(arms, target)


def test_plain_decoding_stands_around_every_few_runs(target):
    (family,) = families([LOOKUP], target)
    runs = sequence(family.timed())
    places = [index for index, run in enumerate(runs) if run is None]
    assert places[0] == 0
    assert places[-1] == len(runs) - 1
    assert max(b - a for a, b in pairwise(places)) <= 5
    assert [run for run in runs if run] == family.timed()


def test_shapes_of_one_drafter_share_their_weights(target, head):
    (family,) = families([arm("a", head, depth=2, width=1)], target)
    built = Drafters(target)
    first, second = (built.get(candidate) for candidate in family.timed()[:2])
    assert first is not second
    pairs = zip(first.head.parameters(), second.head.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
