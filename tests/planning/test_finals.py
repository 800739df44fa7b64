from dataclasses import replace

import numpy as np
import pytest

from specdec.planning.candidates import Shape
from specdec.planning.costs import Costs
from specdec.planning.fit import median_polish
from specdec.planning.plan import confirm
from specdec.planning.prediction import Acceptance, Forecast
from specdec.planning.times import TimedRun
from tests.planning.toys import CONTEXT, Machine, candidate, chain_tau, expected

MACHINE = Machine()
CHAINS = [candidate(Shape(depth, 1, depth, False)) for depth in range(1, 13)]
PLAIN = MACHINE.step(Shape(0, 1, 0, False), 0, 1)
PARTS = ("draft_s", "target_s", "other_s")


def predictions(runs=()):
    """Of all chains, from the fits and from what was timed besides."""
    fitted = MACHINE.costs(CHAINS)
    timed = [TimedRun(None, [PLAIN] * 5, PLAIN.wall_s)]
    timed += [
        TimedRun(c, [MACHINE.step(c.shape, c.shape.nodes, 1)] * 5, PLAIN.wall_s) for c in CHAINS
    ]
    costs = Costs(fitted.forward, {1: timed}, runs)
    acceptance = Acceptance(lambda o: expected(chain_tau(0.8, o["depth"]), o["depth"]))
    return Forecast(costs, acceptance, CONTEXT)


FINALISTS = 6


class Truth:
    """Some configurations are slower than the fits believe, and some moments than others."""

    def __init__(self, factors, slow_rounds=(), slow_runs=()):
        self.factors, self.slow_rounds, self.slow_runs = factors, slow_rounds, slow_runs
        self.timed = []

    def time(self, candidates):
        self.timed += [c.shape.depth for c in candidates]
        return [run for number in range(7) for run in self.round(number, [None, *candidates, None])]

    def round(self, number, candidates):
        for each in candidates:
            depth = each.shape.depth if each else 0
            slow = 2.0 if number in self.slow_rounds else 1.0
            slow *= 3.0 if (number, depth) in self.slow_runs else 1.0
            step = self.step(each) if each else PLAIN
            step = replace(step, **{p: slow * getattr(step, p) for p in PARTS})
            yield TimedRun(each, [step] * 4, slow * PLAIN.wall_s, number)

    def step(self, each):
        step = MACHINE.step(each.shape, each.shape.nodes, 1)
        factor = self.factors.get(each.shape.depth, 1.0)
        return replace(step, target_s=factor * step.target_s)


def ranked():
    found = predictions()
    return sorted((found(c, 1) for c in CHAINS), key=lambda p: -p.speedup)


def predict(candidates, finals):
    found = predictions(finals)
    return [found(each, 1) for each in candidates]


def confirmed(truth):
    return confirm(ranked(), FINALISTS, truth.time, predict)


def test_a_flattered_configuration_is_found_out():
    first, second = ranked()[:2]
    order, _ = confirmed(Truth({first.candidate.shape.depth: 3.0}))
    assert order[0].candidate == second.candidate
    assert order[0].is_timed


def test_the_choice_has_always_been_timed_itself():
    truth = Truth({p.candidate.shape.depth: 3.0 for p in ranked()[:FINALISTS]})
    order, _ = confirmed(truth)
    assert [p.is_timed for p in order] == [True] * FINALISTS + [False] * 6
    assert [p.candidate for p in order[FINALISTS:]] == [p.candidate for p in ranked()[FINALISTS:]]


def test_what_is_true_to_the_fits_keeps_its_place_and_its_speed():
    truth = Truth({})
    order, finals = confirmed(truth)
    assert [p.candidate for p in order] == [p.candidate for p in ranked()]
    assert truth.timed == [p.candidate.shape.depth for p in ranked()[:FINALISTS]]
    assert {run.candidate.shape.depth for run in finals if run.candidate} == set(truth.timed)
    for again, before in zip(order, ranked(), strict=True):
        assert again.speedup == pytest.approx(before.speedup, rel=0.02)


def test_moments_in_which_the_machine_was_busy_decide_nothing():
    depths = [p.candidate.shape.depth for p in ranked()[:FINALISTS]]
    calm, _ = confirmed(Truth({}))
    busy, _ = confirmed(
        Truth(
            {},
            slow_rounds=(1, 4),
            slow_runs=[(0, depths[0]), (2, depths[0]), (5, depths[3]), (6, 0)],
        )
    )
    assert [p.candidate for p in busy] == [p.candidate for p in calm]
    for one, other in zip(busy, calm, strict=True):
        assert one.speedup == pytest.approx(other.speedup)


def test_parts_of_a_timed_step_add_up_to_its_time():
    order, _ = confirmed(Truth({}, slow_rounds=(0,)))
    for prediction in order[:FINALISTS]:
        own = MACHINE.step(prediction.candidate.shape, prediction.candidate.shape.nodes, 1)
        assert prediction.step.wall_s == pytest.approx(own.wall_s)
        assert prediction.step.draft_s == pytest.approx(own.draft_s)


def test_a_plan_stands_where_nothing_could_be_timed():
    order, finals = confirm(ranked(), FINALISTS, lambda candidates: [], predict)
    assert finals == []
    assert [p.candidate for p in order] == [p.candidate for p in ranked()]
    assert not order[0].is_timed


def test_a_median_polish_finds_what_was_added_and_leaves_over_what_was_not():
    rows, columns = (
        np.array([0.0, 5.0, 2.0, -1.0, 9.0])[:, None],
        np.array([0.0, 1.0, -3.0, 4.0, 6.0]),
    )
    table = rows + columns
    table[2, 3] += 50
    table[4, 1] = np.nan
    found, residuals = median_polish(table)
    assert found - found[0] == pytest.approx(columns)
    assert residuals[2, 3] == pytest.approx(50)
    residuals[2, 3] = 0
    assert np.nanmax(np.abs(residuals)) < 1e-9
