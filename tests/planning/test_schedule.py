from dataclasses import replace

import pytest

from specdec.engine.draft_length import Schedule as LoopSchedule
from specdec.planning.candidates import Candidate, Shape
from specdec.planning.plan import MARGIN, cuts, schedule
from specdec.planning.prediction import Acceptance, Forecast
from specdec.planning.times import TimedRun
from tests.planning.toys import (
    CONTEXT,
    Machine,
    ToyExpected,
    candidate,
    chain_tau,
    expected,
)

CHAIN = candidate(Shape(8, 1, 8, False))
TIMED = [candidate(Shape(depth, 1, depth, False)) for depth in (1, 2, 4, 8)]
SIZES = (1, 4, 16)


def predict(options):
    return expected(chain_tau(0.7, options["depth"]), options["depth"])


def lengths(machine):
    return schedule(
        Forecast(machine.costs(TIMED, SIZES), Acceptance(predict), CONTEXT), CHAIN, SIZES
    )


def test_the_draft_shrinks_with_the_batch_down_to_none_where_verifying_is_dear():
    found = lengths(Machine(forward_s=4e-3, per_token_s=4e-4))
    assert found.nodes[1] > found.nodes[4] > found.nodes[16] == 0


def test_free_verification_keeps_the_draft_at_every_batch():
    found = lengths(Machine(per_token_s=0.0))
    assert found.nodes[1] == found.nodes[4] == found.nodes[16] > 0


def test_a_gain_within_the_margin_is_no_reason_to_draft():
    """Drafting that saves a hundredth is left, as noise could do the same."""
    gain = 1 + MARGIN / 2
    step_s = chain_tau(0.7, 1) / gain * 4e-3
    machine = Machine(4e-3, 0.0, step_s - 4e-3, 0.0, 0.0)
    one = candidate(Shape(1, 1, 1, False))
    found = schedule(Forecast(machine.costs([one]), Acceptance(predict), CONTEXT), one, (1,))
    assert found.predictions[1][0].speedup == pytest.approx(gain, rel=1e-4)
    assert found.nodes == {1: 0}


def test_the_controller_table_holds_whole_steps_and_plain_decoding():
    machine = Machine()
    found = lengths(machine)
    assert set(found.step_s) == set(SIZES)
    for size, row in found.step_s.items():
        assert list(row) == [0, 1, 2, 3, 4, 5, 6, 8]
        for nodes, seconds in row.items():
            shape = Shape(nodes, 1, nodes, False)
            wanted = machine.step(shape, nodes, size).wall_s
            assert seconds == pytest.approx(wanted, rel=0.02)


def test_the_loop_follows_the_schedule():
    found = lengths(Machine(forward_s=4e-3, per_token_s=4e-4))
    loop = LoopSchedule(found.nodes)
    assert loop.choose(1) == found.nodes[1]
    assert loop.choose(5) == found.nodes[4]
    assert loop.choose(64) == 0


def test_a_strategy_without_shapes_is_only_cut_to_itself():
    given = Candidate("mine", "another", {"power": 3}, "another", Shape(0, 1, 9, True))
    assert [(c.shape.nodes, c.options) for c in cuts(given)] == [(9, {"power": 3})]


def test_a_tree_that_was_given_node_by_node_is_not_cut():
    options = {"choices": [[0], [0, 0], [1]]}
    given = Candidate("mine", "eagle", options, "eagle", Shape(2, 2, 3, True))
    assert [c.options for c in cuts(given)] == [options]


def test_cutting_a_tree_bounds_its_levels_by_its_nodes():
    tree = candidate(Shape(5, 2, 7, True))
    found = {c.shape.nodes: c for c in cuts(tree)}
    assert found[3].options == {"depth": 3, "width": 2, "max_nodes": 3}
    assert found[7].options == tree.options


def test_a_choice_that_was_timed_keeps_its_length_and_the_table_has_one_ruler():
    """Its own time is worse than the fits', which would make a cut the faster one."""
    machine = Machine(forward_s=4e-3, per_token_s=4e-4)
    runs = [
        TimedRun(each, [replace(machine.step(shape, shape.nodes, 1), target_s=slow)] * 5, 1.0)
        for each, shape, slow in ((None, Shape(0, 1, 0, False), 4e-3), (CHAIN, CHAIN.shape, 9e-3))
    ]
    fitted, costs = machine.costs(TIMED), machine.costs(TIMED, finals=runs)
    forecast = Forecast(costs, Acceptance(predict), CONTEXT)
    found = schedule(forecast, CHAIN, (1,))
    assert found.nodes == {1: 8}
    assert found.predictions[1][-1].is_timed
    wanted = schedule(Forecast(fitted, Acceptance(predict), CONTEXT), CHAIN, (1,))
    assert found.step_s == wanted.step_s
    assert wanted.nodes[1] < 8


def test_the_controller_is_charged_for_what_a_step_drafts_and_not_for_the_mean_step():
    """A lookup that finds something in two steps of five is cheap on the mean, not when it does."""
    machine = Machine(level_s=0.0)
    budgets = [candidate(Shape(0, 1, n, False), "suffix", "suffix") for n in (1, 3, 6, 8)]
    seldom = ToyExpected([121, 121], [100, 100], [300, 300], [[40], [40]])
    forecast = Forecast(machine.costs(budgets), Acceptance(lambda options: seldom), CONTEXT)
    found = schedule(forecast, budgets[-1], (1,))
    assert found.step_s[1][8] == pytest.approx(
        machine.step(budgets[-1].shape, 8, 1).wall_s, rel=0.02
    )
    assert found.predictions[1][-1].step.wall_s < 0.95 * found.step_s[1][8]
