from dataclasses import replace

from specdec.planning.costs import Costs
from specdec.planning.finals import FINALISTS, MOST_FINALS, confirm
from specdec.planning.loop_times import TimedRun
from specdec.planning.prediction import Acceptance, Forecast
from specdec.planning.shape import Shape
from tests.planning.toys import CONTEXT, Machine, candidate, chain_tau, expected

MACHINE = Machine()
CHAINS = [candidate(Shape(depth, 1, depth, False)) for depth in range(1, 13)]
PLAIN = MACHINE.step(Shape(0, 1, 0, False), 0, 1)


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


class Truth:
    """Some configurations are slower than the fits believe."""

    def __init__(self, factors):
        self.factors, self.turns = factors, []

    def time(self, candidates, turn):
        self.turns.append([c.shape.depth for c in candidates])
        return [TimedRun(c, [self.step(c)] * 4, PLAIN.wall_s) for c in candidates]

    def step(self, each):
        step = MACHINE.step(each.shape, each.shape.nodes, 1)
        factor = self.factors.get(each.shape.depth, 1.0)
        return replace(step, target_s=factor * step.target_s)


def ranked():
    found = predictions()
    return sorted((found(c, 1) for c in CHAINS), key=lambda p: -p.speedup)


def confirmed(truth):
    return confirm(ranked(), truth.time, lambda c, finals: predictions(finals)(c, 1))


def test_a_flattered_configuration_is_found_out():
    first, second = ranked()[:2]
    truth = Truth({first.candidate.shape.depth: 3.0})
    order, finals = confirmed(truth)
    assert order[0].candidate == second.candidate
    assert order[0].is_timed
    assert {run.candidate.key for run in finals} == {p.candidate.key for p in ranked()[:FINALISTS]}


def test_the_choice_has_always_been_timed_itself():
    fast = {p.candidate.shape.depth: 3.0 for p in ranked()[:FINALISTS]}
    truth = Truth(fast)
    order, _ = confirmed(truth)
    assert len(truth.turns) == 2
    assert order[0].is_timed
    assert order[0].candidate.shape.depth not in fast


def test_what_is_true_to_the_fits_keeps_its_place_and_is_timed_once():
    truth = Truth({})
    order, _ = confirmed(truth)
    assert [p.candidate for p in order[:FINALISTS]] == [p.candidate for p in ranked()[:FINALISTS]]
    assert truth.turns == [[p.candidate.shape.depth for p in ranked()[:FINALISTS]]]


def test_finals_end_even_where_nothing_can_be_timed():
    turns = []
    order, finals = confirm(
        ranked(),
        lambda candidates, turn: turns.append(turn) or [],
        lambda c, timed: predictions(timed)(c, 1),
    )
    assert (len(turns), finals) == (MOST_FINALS, [])
    assert not order[0].is_timed
