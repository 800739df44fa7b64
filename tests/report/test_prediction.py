"""Plans matched with what was measured, and draft shapes read from options."""

from types import SimpleNamespace

import made_runs
import pytest

from specdec.bench.results import BenchResults
from specdec.planning.results import Plan
from specdec.report.document import AbsentError, Section
from specdec.report.plan import (
    add_predictions,
    axis_of,
    find_shapes,
    match_plan,
    summarize,
)


@pytest.fixture
def bench():
    return BenchResults.read(made_runs.bench())


@pytest.fixture
def plan():
    return Plan.read(made_runs.plan())


def test_configuration_matches_arm_of_same_options(plan, bench):
    for each in match_plan(plan, bench.arms, 1):
        each.planned.predicted_speedup = 1.05 * each.arm.speedup_vs_plain
    found = match_plan(plan, bench.arms, 1)
    assert {each.arm.name for each in found} == set(list(made_runs.ARMS.values())[2:])
    assert [each.error for each in found] == pytest.approx([0.05] * 3)
    assert summarize(found) == (
        "3 configurations: median error 5.0 %, rank correlation (Spearman) 1.000."
    )
    assert summarize(found[:2]).endswith("(Spearman) not defined.")


def test_options_left_out_are_their_defaults(plan, bench):
    eagle3 = [each for each in plan.configurations if each.type == "eagle3"]
    for each in eagle3:
        each.options |= {"children": "top", "path": "demo"}
    assert len(match_plan(plan, bench.arms, 1)) == 3
    for each in eagle3:
        each.options["children"] = "without_replacement"
    assert [each.arm.type for each in match_plan(plan, bench.arms, 1)] == ["ngram"]


def test_other_batch_or_changing_length_is_not_matched(plan, bench):
    assert match_plan(plan, bench.arms, 4) == []
    bench.arms[2].draft_length = {"1": 4}
    names = [each.arm.name for each in match_plan(plan, bench.arms, 1)]
    assert bench.arms[2].name not in names


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("threads", 8, "threads is '8', not '2'"),
        ("dtype", "bfloat16", "dtype is 'bfloat16', not 'float32'"),
        ("cpu", "Another", "cpu is 'Another'"),
        ("config.sampling.temperature", 1.0, "sampling.temperature is '1.0', not '0.0'"),
    ],
)
def test_plan_of_another_machine_is_not_matched(place, value, message):
    content = made_runs.changed(f"provenance.{place}", value)
    runs = [made_runs.run(made_runs.plan(), kind="plan"), made_runs.run(content)]
    section = Section(id="prediction", title="Prediction")
    with pytest.raises(AbsentError, match="No configuration of a plan was measured"):
        add_predictions(section, runs)
    assert message in section.missing[0]


def shapes(*arms):
    named = zip("abcdefgh", arms, strict=False)
    return find_shapes(
        [SimpleNamespace(name=name, speed=1.5, **arm) for name, arm in named], "speed"
    )


def test_shapes_come_from_options_with_defaults():
    trees, chains = shapes(
        {"type": "eagle3", "options": {"depth": 4, "width": 1}},
        {"type": "eagle3", "options": {"depth": 6, "width": 1}},
        {"type": "eagle3", "options": {"width": 2}},
        {"type": "eagle3", "options": {"max_nodes": 8}},
        {"type": "suffix", "options": {"max_nodes": 6}},
        {"type": "suffix", "options": {"max_nodes": 9}},
        {"type": "eagle3", "options": {"path": "other", "depth": 4, "width": 1}},
        {"type": "eagle3", "options": {"choices": [[0]]}},
        {"type": "eagle3", "options": {}, "draft_length": {"1": 2}},
        {"type": "hf_assisted", "options": {}},
    )
    assert {group: [(p.name, p.length) for p in points] for group, points in chains.items()} == {
        "eagle3": [("a", 4), ("b", 6)],
        "suffix": [("e", 6), ("f", 9)],
    }
    assert [point.name for point in trees["eagle3"]] == ["c", "d"]
    assert trees["eagle3"][0][:3] == (5, 2, 24)


def test_heat_map_needs_more_than_half_its_grid():
    grid = [(2, 8), (4, 16), (2, 16), (6, 8), (6, 16)]
    options = [{"depth": depth, "max_nodes": nodes} for depth, nodes in grid]
    found = shapes(*({"type": "eagle3", "options": each} for each in options))[0]["eagle3"]
    assert [axis_of(found[:num]) for num in (2, 3, 4, 5)] == [None, "nodes", "nodes", "nodes"]
    assert axis_of([found[0], found[3]]) == "width"
