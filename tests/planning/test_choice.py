"""The choice on machines that follow formulas: search, finals, and lengths by batch size."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from specdec.drafters.base import DraftShape
from specdec.engine.draft_length import Schedule as LoopSchedule
from specdec.planning.candidates import Candidate
from specdec.planning.prediction import Acceptance, Forecast
from specdec.planning.search import MARGIN, SLACK, confirm, schedule, search
from specdec.planning.times import PARTS, TimedRun
from tests.planning.toys import (
    CHAINS,
    CONTEXT,
    NO_DRAFT,
    Machine,
    ToyExpected,
    candidate,
    chain_tau,
    expected,
    tree_tau,
)

TREES = [
    DraftShape(depth, width, nodes, True)
    for depth, width, nodes in itertools.product((2, 3, 4, 6, 8), (2, 3, 4), (4, 6, 8, 12, 16, 24))
    if depth < nodes <= width + (depth - 1) * width * width
]
ALL = [candidate(shape) for shape in CHAINS + TREES]
CHAIN_CANDIDATES = ALL[: len(CHAINS)]
MACHINE = Machine()
PLAIN = MACHINE.step(NO_DRAFT, 0, 1)


def forecast(costs, accept):
    """Predictions from costs, and acceptance as a function of options."""
    return Forecast(costs, Acceptance(accept), CONTEXT)


def accepting(alpha, asked=None):
    """Acceptance of chains and trees whose tokens are taken with probability alpha."""

    def accept(options):
        if asked is not None:
            asked.append(options)
        shape = DraftShape(options["depth"], options["width"], options["max_nodes"], True)
        tau = chain_tau(alpha, shape.depth) if shape.width == 1 else tree_tau(alpha, shape)
        return expected(tau, shape.nodes)

    return accept


def found_by_search(found, candidates=ALL, wanted=1):
    return search(
        candidates, lambda c: found(c, 1), lambda c, larger: found.bound(c, 1, larger), wanted
    )


@pytest.mark.parametrize("seed", range(12))
def test_search_finds_what_an_exhaustive_one_finds(seed):
    rng = np.random.default_rng(seed)
    machine = Machine(
        per_token_s=float(rng.choice([1e-5, 1e-4, 1e-3])), level_s=float(rng.uniform(1e-4, 3e-3))
    )
    asked = []
    found = forecast(machine.costs(ALL), accepting(float(rng.uniform(0.3, 0.95)), asked))
    ranked = found_by_search(found)
    assert len(asked) < len(ALL)
    every = [found(each, 1) for each in ALL]
    assert ranked[0].speedup == max(each.speedup for each in every)
    looked_at = {each.candidate.name for each in ranked}
    left_out = [each.speedup for each in every if each.candidate.name not in looked_at]
    assert max(left_out) <= ranked[0].speedup


def test_the_optimum_of_a_chain_is_known():
    machine = Machine(per_token_s=0.0, level_s=4e-4, rest_s=0.0, node_s=0.0)
    found = forecast(machine.costs(ALL), accepting(0.8))
    best = found_by_search(found, CHAIN_CANDIDATES)[0]
    speeds = {n: chain_tau(0.8, n) / (1 + 0.1 * n) for n in range(1, 13)}
    assert best.candidate.shape.depth == max(speeds, key=speeds.get)
    assert best.speedup == pytest.approx(max(speeds.values()), rel=1e-3)


def test_slow_given_configurations_are_predicted():
    slow = replace(candidate(DraftShape(12, 1, 12, False)), name="mine", is_given=True)
    found = forecast(Machine(level_s=1e-2).costs(ALL), accepting(0.3))
    ranked = found_by_search(found, [slow, *ALL])
    assert "mine" in [each.candidate.name for each in ranked]
    assert [each.speedup for each in ranked] == sorted((e.speedup for e in ranked), reverse=True)


def wider_is_better(options):
    """Acceptance that no larger draft has less of, as the bounds assume."""
    width = min(options["width"], 1 + options["max_nodes"] / 12)
    return expected(chain_tau(1 - 0.3**width, options["depth"]), options["max_nodes"])


@pytest.mark.parametrize("level_s", [1e-4, 1e-3, 3e-3])
def test_runners_up_are_those_of_exhaustive_search(level_s):
    found = forecast(Machine(level_s=level_s).costs(ALL), wider_is_better)
    ranked = found_by_search(found, wanted=6)
    every = sorted((found(each, 1).speedup for each in ALL), reverse=True)
    assert [each.speedup for each in ranked[:6]] == every[:6]
    assert len(ranked) < len(ALL)


def test_a_reranked_tree_may_lose_by_growing():
    """A larger tree that accepts less than a part of it, within the slack, hides nothing."""
    large, small = candidate(DraftShape(3, 2, 8, True)), candidate(DraftShape(3, 2, 4, True))
    taus = {8: 2.0, 4: 2.0 * (1 + SLACK * 0.9)}
    costs = Machine(per_token_s=0.0, node_s=0.0).costs([large, small])
    found = forecast(costs, lambda o: expected(taus[o["max_nodes"]], o["max_nodes"]))
    assert found_by_search(found, [large, small])[0].candidate == small


FINALISTS = 6


def predictions(finals=()):
    """Of all chains, from fits that hold and from what was timed besides."""
    costs = MACHINE.costs(CHAIN_CANDIDATES, finals=finals)
    return forecast(costs, lambda o: expected(chain_tau(0.8, o["depth"]), o["depth"]))


def predict(candidates, finals=()):
    found = predictions(finals)
    return [found(each, 1) for each in candidates]


@pytest.fixture(scope="module")
def ranked():
    return sorted(predict(CHAIN_CANDIDATES), key=lambda p: -p.speedup)


def confirmed(ranked, factors=None, slow_rounds=(), slow_runs=()):
    """Finals in which some shapes are slower than the fits believe, and some moments than others.

    Returns:
        The order, and what was timed.
    """

    def run(each, number):
        shape = each.shape if each else NO_DRAFT
        step = MACHINE.step(shape, shape.nodes, 1)
        step = replace(step, target_s=(factors or {}).get(shape.depth, 1.0) * step.target_s)
        slow = 2.0 if number in slow_rounds else 1.0
        slow *= 3.0 if (number, shape.depth) in slow_runs else 1.0
        step = replace(step, **{part: slow * getattr(step, part) for part in PARTS})
        return TimedRun(each, [step] * 4, slow * PLAIN.wall_s, number)

    def time(candidates):
        return [run(each, number) for number in range(7) for each in [None, *candidates, None]]

    return confirm(ranked, FINALISTS, time, predict)


def test_a_flattered_configuration_is_found_out(ranked):
    first, second = ranked[:2]
    order, _ = confirmed(ranked, {first.candidate.shape.depth: 3.0})
    assert order[0].candidate == second.candidate
    assert order[0].is_timed


def test_the_choice_was_always_timed_itself(ranked):
    order, _ = confirmed(ranked, {p.candidate.shape.depth: 3.0 for p in ranked[:FINALISTS]})
    assert [p.is_timed for p in order] == [True] * FINALISTS + [False] * 6
    assert [p.candidate for p in order[FINALISTS:]] == [p.candidate for p in ranked[FINALISTS:]]


def test_fits_that_hold_keep_places_and_speeds(ranked):
    order, finals = confirmed(ranked)
    assert [p.candidate for p in order] == [p.candidate for p in ranked]
    depths = {run.candidate.shape.depth for run in finals if run.candidate}
    assert depths == {p.candidate.shape.depth for p in ranked[:FINALISTS]}
    for again, before in zip(order, ranked, strict=True):
        assert again.speedup == pytest.approx(before.speedup, rel=0.02)


def test_busy_moments_decide_nothing(ranked):
    depths = [p.candidate.shape.depth for p in ranked[:FINALISTS]]
    calm, _ = confirmed(ranked)
    slow_runs = [(0, depths[0]), (2, depths[0]), (5, depths[3]), (6, 0)]
    busy, _ = confirmed(ranked, slow_rounds=(1, 4), slow_runs=slow_runs)
    assert [p.candidate for p in busy] == [p.candidate for p in calm]
    for one, other in zip(busy, calm, strict=True):
        assert one.speedup == pytest.approx(other.speedup)
    for prediction in busy[:FINALISTS]:
        own = MACHINE.step(prediction.candidate.shape, prediction.candidate.shape.nodes, 1)
        assert prediction.step.wall_s == pytest.approx(own.wall_s)
        assert prediction.step.draft_s == pytest.approx(own.draft_s)


def test_a_plan_stands_where_nothing_is_timed(ranked):
    order, finals = confirm(ranked, FINALISTS, lambda candidates: [], predict)
    assert finals == []
    assert [p.candidate for p in order] == [p.candidate for p in ranked]
    assert not order[0].is_timed


CHAIN = candidate(DraftShape(8, 1, 8, False))
TIMED = [candidate(DraftShape(depth, 1, depth, False)) for depth in (1, 2, 4, 8)]
SIZES = (1, 4, 16)


def lengths(machine, sizes=SIZES, chosen=CHAIN, timed=TIMED, finals=()):
    costs = machine.costs(timed, sizes, finals)
    found = forecast(costs, lambda o: expected(chain_tau(0.7, o["depth"]), o["depth"]))
    return schedule(found, chosen, sizes)


def test_drafts_shrink_as_the_batch_grows():
    found = lengths(Machine(forward_s=4e-3, per_token_s=4e-4))
    assert found.nodes[1] > found.nodes[4] > found.nodes[16] == 0
    loop = LoopSchedule(found.nodes)
    assert [loop.choose(size) for size in (1, 5, 64)] == [found.nodes[1], found.nodes[4], 0]


def test_a_gain_within_the_margin_is_left():
    """Drafting that saves a hundredth is left, as noise could do the same."""
    gain = 1 + MARGIN / 2
    step_s = chain_tau(0.7, 1) / gain * 4e-3
    one = candidate(DraftShape(1, 1, 1, False))
    found = lengths(Machine(4e-3, 0.0, step_s - 4e-3, 0.0, 0.0), (1,), one, [one])
    assert found.predictions[1][0].speedup == pytest.approx(gain, rel=1e-4)
    assert found.nodes == {1: 0}


def test_the_controller_table_holds_whole_steps():
    found = lengths(MACHINE)
    assert set(found.step_s) == set(SIZES)
    for size, row in found.step_s.items():
        assert list(row) == [0, 1, 2, 3, 4, 5, 6, 8]
        for nodes, seconds in row.items():
            wanted = MACHINE.step(DraftShape(nodes, 1, nodes, False), nodes, size).wall_s
            assert seconds == pytest.approx(wanted, rel=0.02)


def test_a_timed_choice_keeps_its_length():
    """Its own time is worse than the fits', which would make a cut the faster one."""
    machine = Machine(forward_s=4e-3, per_token_s=4e-4)
    runs = [
        TimedRun(each, [replace(machine.step(shape, shape.nodes, 1), target_s=slow)] * 5, 1.0)
        for each, shape, slow in ((None, NO_DRAFT, 4e-3), (CHAIN, CHAIN.shape, 9e-3))
    ]
    found, wanted = lengths(machine, (1,), finals=runs), lengths(machine, (1,))
    assert found.nodes == {1: 8}
    assert found.predictions[1][-1].is_timed
    assert found.step_s == wanted.step_s  # the table has one ruler
    assert wanted.nodes[1] < 8


def test_the_controller_pays_for_what_is_drafted():
    """A lookup that finds something in two steps of five is cheap on the mean, not when it does."""
    machine = Machine(level_s=0.0)
    budgets = [candidate(DraftShape(0, 1, n, False), "suffix", "suffix") for n in (1, 3, 6, 8)]
    seldom = ToyExpected([121, 121], [100, 100], [300, 300], [[40], [40]])
    found = schedule(forecast(machine.costs(budgets), lambda o: seldom), budgets[-1], (1,))
    whole = machine.step(budgets[-1].shape, 8, 1).wall_s
    assert found.step_s[1][8] == pytest.approx(whole, rel=0.02)
    assert found.predictions[1][-1].step.wall_s < 0.95 * found.step_s[1][8]


LOOKUP = Candidate("lookup", "ngram", {}, "lookup", DraftShape(0, 1, 3, False))
LOOKUPS = [replace(LOOKUP, shape=DraftShape(0, 1, n, False)) for n in range(4)]


def test_speed_is_the_ratio_of_total_times():
    one = candidate(DraftShape(2, 1, 2, False))
    acceptance = ToyExpected([11, 151], [2, 100], [4, 200], [[2], [100]])
    found = forecast(MACHINE.costs([one]), lambda o: acceptance)(one, 1)
    step = MACHINE.step(one.shape, 2, 1).wall_s
    wanted = (10 + 150) * PLAIN.wall_s / ((2 + 100) * step)
    assert found.speedup == pytest.approx(wanted, rel=1e-3)
    low, high = found.speedup_ci
    assert low < found.speedup < high


@pytest.mark.parametrize(("drafted", "judging"), [(27, 27), (30, 27), (81, 27), (0, 0), (20, 100)])
def test_steps_without_a_draft_cost_plain_steps(drafted, judging):
    """Shares of step sizes sum to one, whatever share of the steps drafts."""
    acceptance = ToyExpected([121], [100], [drafted], [[judging]])
    found = forecast(MACHINE.costs(LOOKUPS), lambda o: acceptance)(LOOKUP, 1)
    plain, full = (MACHINE.step(LOOKUP.shape, nodes, 1).wall_s for nodes in (0, 3))
    assert plain * 0.99 <= found.step.wall_s <= full * 1.01
    assert found.step.wall_s == pytest.approx(plain + drafted / 100 * (full - plain) / 3, rel=0.02)


def test_a_batch_drafts_where_any_row_does():
    acceptance = ToyExpected([121], [100], [150], [[50]])  # three nodes in every other step
    found = forecast(MACHINE.costs(LOOKUPS, (4,)), lambda o: acceptance)(LOOKUP, 4)
    plain, full = (MACHINE.step(LOOKUP.shape, nodes, 4).wall_s for nodes in (0, 3))
    assert found.step.wall_s == pytest.approx(0.5**4 * plain + (1 - 0.5**4) * full, rel=1e-2)


def test_drafts_cut_near_the_end_cost_less():
    one = candidate(DraftShape(8, 1, 8, False))
    costs = MACHINE.costs(CHAIN_CANDIDATES)
    whole, short = (forecast(costs, lambda o, n=n: expected(3.0, n))(one, 1) for n in (8, 6.5))
    assert short.step.wall_s < whole.step.wall_s
    halfway = [MACHINE.step(one.shape, nodes, 1).wall_s for nodes in (6, 7)]
    assert short.step.wall_s == pytest.approx(sum(halfway) / 2, rel=1e-2)
