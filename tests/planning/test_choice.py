"""The choice on machines that follow formulas: search, finals, and lengths by batch size."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from specdec.drafters.base import DraftShape
from specdec.engine.draft_length import Schedule as LoopSchedule
from specdec.planning.candidates import Candidate, chain
from specdec.planning.choice import MARGIN, SLACK, Forecast, confirm, schedule, search
from tests.planning.toys import (
    CHAINS,
    NO_DRAFT,
    Machine,
    acceptance,
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


def accepting(alpha):
    """Acceptance of chains and trees whose tokens are taken with probability alpha."""

    def accept(options):
        shape = DraftShape(options["depth"], options["width"], options["max_nodes"], True)
        tau = chain_tau(alpha, shape.depth) if shape.width == 1 else tree_tau(alpha, shape)
        return expected(tau, shape.nodes)

    return accept


def speeds(pairs):
    return [configuration.predicted_speedup for _, configuration in pairs]


@pytest.mark.parametrize("seed", range(12))
def test_search_finds_what_an_exhaustive_one_finds(seed):
    rng = np.random.default_rng(seed)
    machine = Machine(
        per_token_s=float(rng.choice([1e-5, 1e-4, 1e-3])), level_s=float(rng.uniform(1e-4, 3e-3))
    )
    found = Forecast(machine.costs(ALL), accepting(float(rng.uniform(0.3, 0.95))))
    ranked = search(found, ALL, 1)
    assert len(ranked) < len(ALL)
    assert speeds(ranked)[0] == max(found(each, 1).predicted_speedup for each in ALL)


def test_the_optimum_of_a_chain_is_known():
    machine = Machine(per_token_s=0.0, level_s=4e-4, rest_s=0.0, node_s=0.0)
    found = Forecast(machine.costs(ALL), accepting(0.8))
    best, configuration = search(found, CHAIN_CANDIDATES, 1)[0]
    wanted = {n: chain_tau(0.8, n) / (1 + 0.1 * n) for n in range(1, 13)}
    assert best.shape.depth == max(wanted, key=wanted.get)
    assert configuration.predicted_speedup == pytest.approx(max(wanted.values()), rel=1e-3)


def test_slow_given_configurations_are_predicted():
    slow = replace(candidate(chain(12)), name="mine", is_given=True)
    ranked = search(Forecast(Machine(level_s=1e-2).costs(ALL), accepting(0.3)), [slow, *ALL], 1)
    assert "mine" in [each.name for each, _ in ranked]
    assert speeds(ranked) == sorted(speeds(ranked), reverse=True)


def wider_is_better(options):
    """Acceptance that no larger draft has less of, as the bounds assume."""
    width = min(options["width"], 1 + options["max_nodes"] / 12)
    return expected(chain_tau(1 - 0.3**width, options["depth"]), options["max_nodes"])


@pytest.mark.parametrize("level_s", [1e-4, 1e-3, 3e-3])
def test_runners_up_are_those_of_exhaustive_search(level_s):
    found = Forecast(Machine(level_s=level_s).costs(ALL), wider_is_better)
    ranked = search(found, ALL, 1, wanted=6)
    every = sorted((found(each, 1).predicted_speedup for each in ALL), reverse=True)
    assert speeds(ranked)[:6] == every[:6]
    assert len(ranked) < len(ALL)


def test_a_reranked_tree_may_lose_by_growing():
    """A larger tree that accepts less than a part of it, within the slack, hides nothing."""
    large, small = candidate(DraftShape(3, 2, 8, True)), candidate(DraftShape(3, 2, 4, True))
    taus = {8: 2.0, 4: 2.0 * (1 + SLACK * 0.9)}
    costs = Machine(per_token_s=0.0, node_s=0.0).costs([large, small])
    found = Forecast(costs, lambda o: expected(taus[o["max_nodes"]], o["max_nodes"]))
    assert search(found, [large, small], 1)[0][0] == small


FINALISTS = 6


def chain_forecast(finals=()):
    """Rank all chains, from fits that hold and from what was timed besides."""
    costs = MACHINE.costs(CHAIN_CANDIDATES, finals=finals)
    return Forecast(costs, lambda o: expected(chain_tau(0.8, o["depth"]), o["depth"]))


@pytest.fixture(scope="module")
def ranked():
    return search(chain_forecast(), CHAIN_CANDIDATES, 1, wanted=len(CHAINS))


def confirmed(ranked, factors=None, slow_rounds=(), slow_runs=()):
    """Finals in which some shapes are slower than the fits believe, and some moments than others.

    `factors` are of the target's time by depth; `slow_runs` are rounds and depths.
    """
    runs = []
    for number in range(7):
        for each in (None, *(each for each, _ in ranked[:FINALISTS]), None):
            depth = each.shape.depth if each else 0
            slow = 2.0 if number in slow_rounds else 1.0
            scale = slow * np.array([1.0, (factors or {}).get(depth, 1.0), 1.0])
            scale *= 3.0 if (number, depth) in slow_runs else 1.0
            plain_s = slow * MACHINE.wall(NO_DRAFT, 0)
            runs.append(MACHINE.run(each, scale=scale, round=number, plain_s=plain_s))
    return confirm(chain_forecast(runs), ranked, 1, FINALISTS)


def test_a_flattered_configuration_is_found_out(ranked):
    (first, _), (second, _) = ranked[:2]
    assert confirmed(ranked, {first.shape.depth: 3.0})[0][0] == second


def test_the_choice_was_always_timed_itself(ranked):
    order = confirmed(ranked, {each.shape.depth: 3.0 for each, _ in ranked[:FINALISTS]})
    assert [found.is_timed for _, found in order] == [True] * FINALISTS + [False] * 6
    assert order[FINALISTS:] == ranked[FINALISTS:]


def test_fits_that_hold_stay_and_busy_moments_decide_nothing(ranked):
    calm = confirmed(ranked)
    assert [each for each, _ in calm] == [each for each, _ in ranked]
    assert speeds(calm) == pytest.approx(speeds(ranked), rel=0.02)
    depths = [each.shape.depth for each, _ in ranked[:FINALISTS]]
    slow_runs = [(0, depths[0]), (2, depths[0]), (5, depths[3]), (6, 0)]
    busy = confirmed(ranked, slow_rounds=(1, 4), slow_runs=slow_runs)
    assert [each for each, _ in busy] == [each for each, _ in calm]
    assert speeds(busy) == pytest.approx(speeds(calm))
    for each, found in busy[:FINALISTS]:
        draft, *_ = own = 1000 * MACHINE.times(each.shape, each.shape.nodes)
        assert (found.step_ms.wall, found.step_ms.draft) == pytest.approx((own.sum(), draft))


def test_a_plan_stands_where_nothing_is_timed(ranked):
    assert confirm(chain_forecast(), ranked, 1, FINALISTS) == ranked
    assert not ranked[0][1].is_timed


CHAIN = candidate(chain(8))
TIMED = [candidate(chain(depth)) for depth in (1, 2, 4, 8)]
SIZES = (1, 4, 16)


def lengths(machine, sizes=SIZES, chosen=CHAIN, timed=TIMED, finals=()):
    costs = machine.costs(timed, sizes, finals)
    found = Forecast(costs, lambda o: expected(chain_tau(0.7, o["depth"]), o["depth"]))
    return schedule(found, chosen, sizes)


def test_drafts_shrink_as_the_batch_grows():
    nodes, _, _ = lengths(Machine(forward_s=4e-3, per_token_s=4e-4))
    assert nodes[1] > nodes[4] > nodes[16] == 0
    loop = LoopSchedule(nodes)
    assert [loop.choose(size) for size in (1, 5, 64)] == [nodes[1], nodes[4], 0]


def test_a_gain_within_the_margin_is_left():
    """Drafting that saves a hundredth is left, as noise could do the same."""
    gain = 1 + MARGIN / 2
    step_s = chain_tau(0.7, 1) / gain * 4e-3
    one = candidate(chain(1))
    nodes, compared, _ = lengths(Machine(4e-3, 0.0, step_s - 4e-3, 0.0, 0.0), (1,), one, [one])
    assert compared[0].predicted_speedup == pytest.approx(gain, rel=1e-4)
    assert nodes == {1: 0}


def test_the_controller_table_holds_whole_steps():
    _, _, step_s = lengths(MACHINE)
    assert set(step_s) == set(SIZES)
    for size, row in step_s.items():
        assert list(row) == [0, 1, 2, 3, 4, 5, 6, 8]
        wanted = [MACHINE.wall(chain(nodes), nodes, size) for nodes in row]
        assert list(row.values()) == pytest.approx(wanted, rel=0.02)


def test_a_timed_choice_keeps_its_length():
    """Its own time is worse than the fits', which would make a cut the faster one."""
    machine = Machine(forward_s=4e-3, per_token_s=4e-4)
    dear = 9e-3 / machine.forward(1, 9)
    runs = [machine.run(None), machine.run(CHAIN, scale=np.array([1, dear, 1]))]
    nodes, compared, step_s = lengths(machine, (1,), finals=runs)
    by_fits = lengths(machine, (1,))
    assert nodes == {1: 8}
    assert compared[-1].is_timed
    assert step_s == by_fits[2]  # the table has one ruler
    assert by_fits[0][1] < 8


def test_the_controller_pays_for_what_is_drafted():
    """A lookup that finds something in two steps of five is cheap on the mean, not when it does."""
    machine = Machine(level_s=0.0)
    budgets = [candidate(DraftShape(0, 1, n, False), "suffix") for n in (1, 3, 6, 8)]
    seldom = Forecast(machine.costs(budgets), lambda o: acceptance([121], [100], [300], [40]))
    _, _, step_s = schedule(seldom, budgets[-1], (1,))
    assert step_s[1][8] == pytest.approx(machine.wall(budgets[-1].shape, 8), rel=0.02)
    assert seldom(budgets[-1], 1).step_ms.wall < 950 * step_s[1][8]


LOOKUP = Candidate("lookup", "ngram", {}, "lookup", DraftShape(0, 1, 3, False))
LOOKUPS = [replace(LOOKUP, shape=DraftShape(0, 1, n, False)) for n in range(4)]


def test_speed_is_the_ratio_of_total_times():
    one = candidate(chain(2))
    two = acceptance([11, 151], [2, 100], [4, 200], [2, 100])
    found = Forecast(MACHINE.costs([one]), lambda o: two)(one, 1)
    wanted = (10 + 150) / (2 + 100) * MACHINE.wall(NO_DRAFT, 0) / MACHINE.wall(one.shape, 2)
    assert found.predicted_speedup == pytest.approx(wanted, rel=1e-3)
    low, high = found.predicted_speedup_ci
    assert low < found.predicted_speedup < high


def lookup_wall(tokens, steps, drafted, judging, batch_size=1):
    given = acceptance([tokens], [steps], [drafted], [judging])
    costs = MACHINE.costs(LOOKUPS, (batch_size,))
    return Forecast(costs, lambda o: given)(LOOKUP, batch_size).step_ms.wall / 1000


@pytest.mark.parametrize(("drafted", "judging"), [(27, 27), (30, 27), (81, 27), (0, 0), (20, 100)])
def test_steps_without_a_draft_cost_plain_steps(drafted, judging):
    """Shares of step sizes sum to one, whatever share of the steps drafts."""
    wall = lookup_wall(121, 100, drafted, judging)
    plain, full = (MACHINE.wall(LOOKUP.shape, nodes) for nodes in (0, 3))
    assert plain * 0.99 <= wall <= full * 1.01
    assert wall == pytest.approx(plain + drafted / 100 * (full - plain) / 3, rel=0.02)


def test_a_batch_drafts_where_any_row_does():
    wall = lookup_wall(121, 100, 150, 50, batch_size=4)  # three nodes in every other step
    plain, full = (MACHINE.wall(LOOKUP.shape, nodes, 4) for nodes in (0, 3))
    assert wall == pytest.approx(0.5**4 * plain + (1 - 0.5**4) * full, rel=1e-2)


def test_drafts_cut_near_the_end_cost_less():
    costs = MACHINE.costs(CHAIN_CANDIDATES)
    whole, short = (
        Forecast(costs, lambda o, n=n: expected(3.0, n))(CHAIN, 1).step_ms.wall for n in (8, 6.5)
    )
    assert short < whole
    halfway = [500 * MACHINE.wall(CHAIN.shape, nodes) for nodes in (6, 7)]
    assert short == pytest.approx(sum(halfway), rel=1e-2)
