import itertools
from dataclasses import replace

import numpy as np
import pytest

from specdec.planning.candidates import Candidate, Shape
from specdec.planning.plan import SLACK, search
from specdec.planning.prediction import Acceptance, Forecast
from tests.planning.toys import (
    CONTEXT,
    Machine,
    ToyExpected,
    candidate,
    chain_tau,
    expected,
    tree_tau,
)

CHAINS = [Shape(depth, 1, depth, False) for depth in range(1, 13)]
TREES = [
    Shape(depth, width, nodes, True)
    for depth, width, nodes in itertools.product((2, 3, 4, 6, 8), (2, 3, 4), (4, 6, 8, 12, 16, 24))
    if depth < nodes <= width + (depth - 1) * width * width
]
ALL = [candidate(shape) for shape in CHAINS + TREES]


def tau_of(options, alpha):
    depth, width, nodes = options["depth"], options["width"], options["max_nodes"]
    if width == 1:
        return chain_tau(alpha, depth)
    return tree_tau(alpha, Shape(depth, width, nodes, True))


def forecast(machine, alpha, asked=None):
    def predict(options):
        if asked is not None:
            asked.append(options)
        return expected(tau_of(options, alpha), options["max_nodes"])

    return Forecast(machine.costs(ALL), Acceptance(predict), CONTEXT)


def run(found, candidates=ALL, wanted=1):
    return search(
        candidates, lambda c: found(c, 1), lambda c, larger: found.bound(c, 1, larger), wanted
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_what_an_exhaustive_one_finds(seed):
    rng = np.random.default_rng(seed)
    machine = Machine(
        per_token_s=float(rng.choice([1e-5, 1e-4, 1e-3])), level_s=float(rng.uniform(1e-4, 3e-3))
    )
    asked = []
    found = forecast(machine, float(rng.uniform(0.3, 0.95)), asked)
    best = run(found)[0]
    num_asked = len(asked)
    every = [found(each, 1) for each in ALL]
    assert best.speedup == max(each.speedup for each in every)
    assert num_asked < len(ALL)


def test_the_optimum_of_a_chain_is_the_known_one():
    machine = Machine(per_token_s=0.0, level_s=4e-4, rest_s=0.0, node_s=0.0)
    found = forecast(machine, 0.8)
    best = run(found, [candidate(shape) for shape in CHAINS])[0]
    speeds = {n: chain_tau(0.8, n) / (1 + 0.1 * n) for n in range(1, 13)}
    assert best.candidate.shape.depth == max(speeds, key=speeds.get)
    assert best.speedup == pytest.approx(max(speeds.values()), rel=1e-3)


def test_dear_nodes_make_the_tree_small_and_free_ones_large():
    dear = run(forecast(Machine(per_token_s=1e-3), 0.5))[0].candidate.shape
    free = run(forecast(Machine(per_token_s=0.0, node_s=0.0, level_s=1e-5), 0.5))[0].candidate.shape
    assert free.nodes > dear.nodes


def test_given_configurations_are_predicted_however_slow_they_are():
    slow = candidate(Shape(12, 1, 12, False))
    given = type(slow)("mine", slow.type, slow.options, slow.drafter, slow.shape, True)
    found = forecast(Machine(level_s=1e-2), 0.3)
    ranked = run(found, [given, *ALL])
    assert "mine" in [each.candidate.name for each in ranked]
    assert [each.speedup for each in ranked] == sorted((e.speedup for e in ranked), reverse=True)


def test_what_is_left_out_is_slower_than_the_best():
    found = forecast(Machine(), 0.7)
    ranked = run(found)
    looked_at = {each.candidate.name for each in ranked}
    left_out = [found(each, 1) for each in ALL if each.name not in looked_at]
    assert left_out
    assert max(each.speedup for each in left_out) <= ranked[0].speedup


def wider_is_better(options):
    """Acceptance that no larger draft has less of, as the bounds assume."""
    width = min(options["width"], 1 + options["max_nodes"] / 12)
    return expected(chain_tau(1 - 0.3**width, options["depth"]), options["max_nodes"])


@pytest.mark.parametrize("level_s", [1e-4, 1e-3, 3e-3])
def test_the_runners_up_are_those_of_an_exhaustive_search(level_s):
    costs = Machine(level_s=level_s).costs(ALL)
    found = Forecast(costs, Acceptance(wider_is_better), CONTEXT)
    ranked = run(found, wanted=6)
    every = sorted((found(each, 1).speedup for each in ALL), reverse=True)
    assert [each.speedup for each in ranked[:6]] == every[:6]
    assert len(ranked) < len(ALL)


def test_a_reranked_tree_may_lose_a_little_by_growing():
    """A larger tree that accepts less than a part of it, within the slack, hides nothing."""
    large, small = candidate(Shape(3, 2, 8, True)), candidate(Shape(3, 2, 4, True))
    taus = {8: 2.0, 4: 2.0 * (1 + SLACK * 0.9)}
    machine = Machine(per_token_s=0.0, node_s=0.0)
    costs = machine.costs([large, small])
    found = Forecast(
        costs, Acceptance(lambda o: expected(taus[o["max_nodes"]], o["max_nodes"])), CONTEXT
    )
    assert run(found, [large, small])[0].candidate == small


def test_speed_is_the_ratio_of_expected_total_times():
    one = candidate(Shape(2, 1, 2, False))
    machine = Machine()
    acceptance = ToyExpected([11, 151], [2, 100], [4, 200], [[2], [100]])
    found = Forecast(machine.costs([one]), Acceptance(lambda options: acceptance), CONTEXT)(one, 1)
    plain = machine.step(Shape(0, 1, 0, False), 0, 1).wall_s
    step = machine.step(one.shape, 2, 1).wall_s
    assert found.speedup == pytest.approx((10 + 150) * plain / ((2 + 100) * step), rel=1e-3)
    low, high = found.speedup_ci
    assert low < found.speedup < high


@pytest.mark.parametrize(("drafted", "judging"), [(27, 27), (30, 27), (81, 27), (0, 0), (20, 100)])
def test_steps_without_a_draft_cost_what_plain_decoding_costs(drafted, judging):
    """Shares of step sizes sum to one, whatever share of the steps drafts."""
    one = Candidate("lookup", "ngram", {}, "lookup", Shape(0, 1, 3, False))
    machine = Machine()
    timed = [replace(one, shape=Shape(0, 1, n, False)) for n in (1, 2, 3)]
    costs = machine.costs([*timed, replace(one, shape=Shape(0, 1, 0, False))])
    acceptance = ToyExpected([121], [100], [drafted], [[judging]])
    found = Forecast(costs, Acceptance(lambda options: acceptance), CONTEXT)(one, 1)
    plain, full = (machine.step(one.shape, nodes, 1).wall_s for nodes in (0, 3))
    assert plain * 0.99 <= found.step.wall_s <= full * 1.01
    assert found.step.wall_s == pytest.approx(plain + drafted / 100 * (full - plain) / 3, rel=0.02)


def test_drafts_that_are_cut_near_the_end_cost_less():
    one = candidate(Shape(8, 1, 8, False))
    machine = Machine()
    costs = machine.costs([candidate(shape) for shape in CHAINS])
    whole = Forecast(costs, Acceptance(lambda o: expected(3.0, 8)), CONTEXT)(one, 1)
    short = Forecast(costs, Acceptance(lambda o: expected(3.0, 6.5)), CONTEXT)(one, 1)
    assert short.step.wall_s < whole.step.wall_s
    halfway = [machine.step(one.shape, nodes, 1).wall_s for nodes in (6, 7)]
    assert short.step.wall_s == pytest.approx(sum(halfway) / 2, rel=1e-2)


def test_a_batch_drafts_where_any_of_its_rows_does():
    one = Candidate("lookup", "ngram", {}, "lookup", Shape(0, 1, 3, False))
    machine = Machine()
    costs = machine.costs([replace(one, shape=Shape(0, 1, n, False)) for n in (0, 1, 2, 3)], (4,))
    acceptance = ToyExpected([121], [100], [150], [[50]])  # three nodes in every other step
    found = Forecast(costs, Acceptance(lambda options: acceptance), CONTEXT)(one, 4)
    plain, full = (machine.step(one.shape, nodes, 4).wall_s for nodes in (0, 3))
    wanted = 0.5**4 * plain + (1 - 0.5**4) * full
    assert found.step.wall_s == pytest.approx(wanted, rel=1e-2)
