"""Plans matched with what was measured, and draft shapes read from options."""

import copy
from pathlib import Path

import made_runs
import pytest

from specdec.report.derived import (
    by_group,
    is_map,
    match,
    match_all,
    median_error,
    points,
    rank_correlation,
    vertical,
)
from specdec.report.runs import Run

RESULTS = made_runs.bench()


@pytest.fixture
def bench():
    return Run("bench", "measured", Path("measured"), copy.deepcopy(RESULTS))


@pytest.fixture
def plan():
    return Run("plan", "planned", Path("planned"), copy.deepcopy(made_runs.plan(RESULTS, 0.05)))


def test_each_configuration_is_matched_with_the_arm_of_its_type_options_and_batch(plan, bench):
    found = match(plan, bench)
    assert sorted(each.arm["name"] for each in found) == sorted(made_runs.ARMS)
    assert all(each.arm["name"] == each.configuration["name"] for each in found)
    assert [each.error for each in found] == pytest.approx([0.05] * 3)
    assert median_error(found) == pytest.approx(0.05)
    assert rank_correlation(found) == pytest.approx(1.0)
    assert rank_correlation(found[:2]) is None


def test_options_that_are_left_out_are_their_defaults(plan, bench):
    for each in plan.data["configurations"]:
        if each["type"] == "eagle3":
            each["options"] |= {"children": "top", "path": "demo"}
    assert len(match(plan, bench)) == 3
    for each in plan.data["configurations"]:
        if each["type"] == "eagle3":
            each["options"]["children"] = "without_replacement"
    assert [each.arm["type"] for each in match(plan, bench)] == ["ngram"]


def test_another_batch_size_or_a_changing_draft_length_is_not_matched(plan, bench):
    bench.data["provenance"]["config"]["batch_size"] = 4
    assert match(plan, bench) == []
    bench.data["provenance"]["config"]["batch_size"] = 1
    bench.data["arms"][2]["draft_length"] = {"1": 4}
    assert bench.data["arms"][2]["name"] not in [m.arm["name"] for m in match(plan, bench)]


@pytest.mark.parametrize(
    ("place", "value"), [("threads", 8), ("dtype", "bfloat16"), ("cpu", "Another")]
)
def test_a_plan_of_another_machine_is_not_matched_and_the_reason_is_told(plan, bench, place, value):
    bench.data["provenance"][place] = value
    found, why = match_all([plan], [bench])
    assert found == []
    assert f"{place} is {str(value)!r}" in why[0]


def test_a_plan_of_another_temperature_is_not_matched(plan, bench):
    bench.data["provenance"]["config"]["sampling"]["temperature"] = 1.0
    found, why = match_all([plan], [bench])
    assert found == []
    assert "sampling.temperature is '1.0', not '0.0'" in why[0]


def test_shapes_are_read_from_options_with_their_defaults():
    arms = [
        {"name": "a", "type": "eagle3", "options": {"depth": 4, "width": 1}},
        {"name": "b", "type": "eagle3", "options": {"width": 2}},
        {"name": "c", "type": "suffix", "options": {"max_nodes": 6}},
        {"name": "d", "type": "eagle3", "options": {"path": "other", "depth": 4, "width": 1}},
        {"name": "e", "type": "eagle3", "options": {"choices": [[0]]}},
        {"name": "f", "type": "eagle3", "options": {}, "draft_length": {"1": 2}},
        {"name": "g", "type": "hf_assisted", "options": {}},
        {"name": "h", "type": "eagle3", "options": {"depth": 4, "width": 1}, "speed": None},
    ]
    found = points([{"speed": 1.5, **arm} for arm in arms], "speed")
    assert [point.name for point in found] == ["a", "b", "c", "d"]
    a, b, c, d = found
    assert (a.depth, a.width, a.is_chain, a.length) == (4, 1, True, 4)
    assert (b.depth, b.width, b.nodes, b.is_chain) == (5, 2, 24, False)
    assert (c.depth, c.is_chain, c.length) == (None, True, 6)
    assert a.group == b.group != d.group
    assert list(by_group(found)) == [a.group]


def test_a_heat_map_needs_more_than_half_of_its_grid():
    shapes = [(2, 8), (4, 16), (2, 16), (6, 8), (6, 16)]
    arms = [
        {
            "name": f"{depth} {nodes}",
            "type": "eagle3",
            "options": {"depth": depth, "max_nodes": nodes},
            "speed": 1.0,
        }
        for depth, nodes in shapes
    ]
    found = points(arms, "speed")
    assert [is_map(found[:count]) for count in (2, 3, 4, 5)] == [False, True, True, True]
    assert vertical(found) == "nodes"
    assert vertical([found[0], found[3]]) == "width"
