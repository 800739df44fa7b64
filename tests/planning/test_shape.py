from itertools import pairwise

import pytest

from specdec.bench.config import ArmConfig
from specdec.planning.candidates import (
    RULES,
    Shape,
    base_options,
    cut,
    families,
    is_searched,
    to_options,
)
from specdec.planning.times import Drafters, sequence
from specdec.registry import DRAFTERS, load_drafter
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


def test_every_rule_names_a_registered_drafter_and_its_options(target):
    import inspect
    from importlib import import_module

    assert set(RULES) <= set(DRAFTERS)
    for kind, rule in RULES.items():
        module, name = DRAFTERS[kind].split(":")
        built = getattr(import_module(module), name)
        accepted = inspect.signature(getattr(built, "load", built)).parameters
        options = {*rule.names.values(), *(() if not rule.searched else rule.fixed)}
        known = {"choices", "acceptance"}  # of any static tree, whatever the drafter takes
        assert options - known <= set(accepted), kind


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
    assert shapes[0] == Shape(2, 1, 2, False)
    assert shapes[1] == Shape(3, 2, 5, True)
    assert shapes[3] == Shape(0, 1, 6, False)


def test_every_searched_shape_can_be_built_and_is_what_it_says(target, head):
    (family,) = families([arm("a", head, depth=2, width=1)], target)
    found = family.searched()
    assert found[0].name == "a"
    assert len({repr(sorted(c.options.items())) for c in found}) == len(found)
    for candidate in found[1:]:
        drafter = load_drafter({"type": candidate.type, **candidate.options}, target)
        assert drafter.max_nodes == candidate.shape.nodes
        assert drafter.makes_trees == candidate.shape.is_tree


def test_a_given_shape_is_not_tried_again_in_other_words(target, head):
    """Options that were left out have defaults, so that one draft can be written in many ways."""
    for options in ({"width": 1}, {"depth": 9, "width": 1, "max_nodes": 4}):
        (family,) = families([arm("mine", head, **options)], target)
        shapes = [c.shape for c in family.searched()]
        assert len(set(shapes)) == len(shapes)


def test_drafters_of_one_type_are_told_apart_whatever_their_arms_are_called(target, head):
    arms = [
        arm("a", head, width=1),
        arm("eagle3", head, width=1, window=16),
        arm("eagle3 2", head, width=1, window=32),
    ]
    assert len({family.name for family in families(arms, target)}) == 3


def test_a_given_shape_beyond_those_timed_is_timed_as_well(target, head):
    arms = [
        arm("large", head, depth=5, width=8, max_nodes=59),
        arm("part of it", head, depth=5, width=8, max_nodes=40),
        arm("small", head, depth=2, width=1),
    ]
    (family,) = families(arms, target)
    (small,) = families(arms[2:], target)
    more = [c.shape for c in family.timed()][len(small.timed()) :]
    assert more == [Shape(5, 8, 59, True)]


def test_sampled_or_given_trees_and_unknown_strategies_are_planned_as_configured():
    assert is_searched("eagle3", {"depth": 3})
    assert not is_searched("eagle3", {"choices": [[0]]})
    assert not is_searched("eagle3", {"children": "with_replacement"})
    assert not is_searched("another", {"power": 3})
    assert base_options("another", {"power": 3}) == {"power": 3}


def test_a_shape_and_its_options_are_the_same_thing():
    chain, tree = Shape(4, 1, 4, False, 0.3), Shape(4, 3, 9, True)
    assert to_options("draft_model", {"path": "x"}, chain) == {
        "path": "x",
        "num_draft_tokens": 4,
        "width": 1,
        "confidence_threshold": 0.3,
    }
    assert to_options("eagle", {}, tree) == {"depth": 4, "width": 3, "max_nodes": 9}
    assert to_options("suffix", {}, Shape(0, 1, 5, False)) == {"max_nodes": 5}


def test_a_chain_is_cut_by_its_length_and_a_budget_by_its_nodes():
    chain = Shape(6, 1, 6, False)
    assert cut("draft_model", {"num_draft_tokens": 6}, chain, 2) == (
        {"num_draft_tokens": 2},
        Shape(2, 1, 2, False),
    )
    assert cut("suffix", {}, Shape(0, 1, 8, False), 3) == ({"max_nodes": 3}, Shape(0, 1, 3, False))


def test_a_shape_covers_its_parts_alone():
    tree = Shape(5, 3, 12, True)
    assert tree.covers(Shape(4, 3, 12, True))
    assert not tree.covers(Shape(6, 3, 12, True))
    assert not tree.covers(Shape(5, 4, 12, True))
    assert not tree.covers(Shape(5, 1, 5, False))
    assert Shape(6, 1, 6, False).covers(Shape(6, 1, 6, False, 0.4))
    assert not Shape(6, 1, 6, False, 0.4).covers(Shape(6, 1, 6, False))


def test_a_configuration_without_a_drafter_cannot_be_planned(target):
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
