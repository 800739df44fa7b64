"""Costs: fits find the formulas behind times, and a busy machine is told."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from specdec.drafters.base import DraftShape
from specdec.planning import measure
from specdec.planning.candidates import Candidate, chain
from specdec.planning.costs import Costs, fit_linear, fit_piecewise, median_polish
from specdec.planning.measure import FULL, Measurements, TimedRun
from specdec.planning.results import Plan
from tests.planning.toys import CONTEXT, NO_DRAFT, Machine, candidate, steps

TOKENS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
MACHINE = Machine()
MIXED = Candidate("mixed", "hybrid", {}, "hybrid", DraftShape(0, 1, 10, True), True)


def quiet(done, total, text):
    """Show no progress."""


def test_a_configuration_timed_as_given_costs_its_mean():
    """Long drafts from a lookup are cheap and short ones of a model dear: no line says both."""
    cheap, dear = np.array([1e-4, 5e-3, 1e-3]), np.array([4e-3, 5e-3, 2e-3])
    mixed = np.concatenate([steps(cheap, 10, 10), steps(dear, 6, 30)])
    costs = Costs(MACHINE.cells(), CONTEXT)
    costs.add(1, [MACHINE.run(None), TimedRun(MIXED, mixed, MACHINE.wall(NO_DRAFT, 0))])
    found, _ = costs.step(MIXED, 1, {7: 1.0})
    assert found == pytest.approx(0.25 * cheap + 0.75 * dear)


def test_times_are_brought_to_one_speed():
    one, costs = candidate(chain(4)), Costs(MACHINE.cells(), CONTEXT)
    plain_s = MACHINE.wall(NO_DRAFT, 0)
    pairs = [(each, slow) for slow in (1, 2) for each in (None, one)]
    costs.add(1, [MACHINE.run(each, scale=n, plain_s=n * plain_s) for each, n in pairs])
    step, _ = costs.step(one, 1, {4: 1.0})
    assert step.sum() / costs.plain[1].sum() == pytest.approx(
        MACHINE.wall(one.shape, 4) / plain_s, rel=1e-3
    )


def test_a_remembering_drafter_meets_each_prompt_once(monkeypatch):
    """Timed three times a round, it meets the prompts of three rounds, and is built anew after."""
    seen = []

    def time_run(work, drafter, batch_size, first):
        seen.append((drafter, first % len(work.texts)))
        return steps((0.0, 1e-3, 1e-4), 0).tolist()

    monkeypatch.setattr(measure, "get_drafter", lambda target, built, run, generation: generation)
    monkeypatch.setattr(measure, "time_run", time_run)
    journal = SimpleNamespace(entries=(), append=lambda row: None)
    work = SimpleNamespace(target=None, texts=range(4))
    Measurements(work, FULL, journal, quiet).decodings([MIXED] * 3, 1, 2)
    drafted = [each for each in seen if each[0] is not None and each[0] >= 0]
    assert len(drafted) == len(set(drafted)) == 6


@pytest.mark.parametrize(
    ("steps_ms", "load", "reason"),
    [
        ((5.0, 5.2, 5.1, 5.3), 1.0, ""),
        ((5.0, 5.2, 9.1, 8.7), 1.0, "the same step of plain decoding took 5.1 to 9.0 ms"),
        ((5.0, 5.2, 5.1, 5.3), 7.0, "the load average was 7.0 on 2 cores"),
    ],
)
def test_a_plan_of_a_busy_machine_is_not_trusted(monkeypatch, steps_ms, load, reason):
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    runs = [TimedRun(None, steps((0.0, ms / 1000, 0.0), 0), ms / 1000) for ms in steps_ms]
    journal = SimpleNamespace(entries=[{"point": {}, "load": load}])
    found = Measurements(None, FULL, journal, quiet).trust(runs)
    assert found.is_trusted == (not reason)
    assert found.reasons == ([reason] if reason else [])


def bent(tokens, context):
    """Flat up to 8 tokens, then a slope; the context adds a little, more for many tokens."""
    return 4e-3 + 2e-4 * max(0, tokens - 8) + 1e-6 * context + 1e-8 * context * tokens


def fitted(formula, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    points = [(n, c) for n in TOKENS for c in (64, 256, 1024)]
    times = [formula(n, c) * (1 + noise * rng.standard_normal()) for n, c in points]
    return fit_piecewise(*zip(*points, strict=True), times)


def test_a_piecewise_fit_finds_the_knot():
    fit = fitted(bent)
    assert 8 in fit.knots
    assert fit.residuals.largest < 1e-6
    for point in ((20, 500), (5, 100)):  # between the points that were measured
        assert fit(*point) == pytest.approx(bent(*point), rel=1e-6)
    assert fit_piecewise([1], [64], [3e-3])(1, 64) == pytest.approx(3e-3)


def test_residuals_show_the_noise():
    fit = fitted(bent, noise=0.05)
    assert 0.02 < fit.residuals.rms < 0.08
    assert fit.residuals.largest >= fit.residuals.rms >= fit.residuals.median > 0
    assert len(fitted(lambda n, c: 4e-3 + 1e-4 * n, noise=0.03, seed=1).knots) <= 1


def test_a_sum_of_parts_is_found_again():
    rows = [(1, n, n * n) for n in range(1, 8)]
    times = [2e-3 + 5e-4 * n for n in range(1, 8)]
    fit = fit_linear(("step", "level", "square"), rows, times, times)
    assert list(fit.coefficients.values()) == pytest.approx([2e-3, 5e-4, 0.0], abs=1e-9)
    assert fit.residuals.largest < 1e-6


def test_no_part_makes_a_step_cheaper():
    fit = fit_linear(("step", "level"), [(1, 0), (1, 10)], [2e-3, 1e-3], [1e-3, 1e-3])
    assert min(fit.coefficients.values()) >= 0
    assert fit.residuals.largest > 0.1


def test_means_of_many_measurements_weigh_more():
    fit = fit_linear(("step",), [(1,), (1,)], [1e-3, 2e-3], [1e-3, 1e-3], [99, 1])
    assert fit.coefficients["step"] == pytest.approx(1.01e-3)
    # Errors are told against the whole step, however often it was measured.
    assert fit.residuals.largest == pytest.approx(0.99)


def test_a_median_polish_finds_what_was_added():
    columns = np.array([0.0, 1.0, -3.0, 4.0, 6.0])
    table = np.array([0.0, 5.0, 2.0, -1.0, 9.0])[:, None] + columns
    table[2, 3] += 50
    table[4, 1] = np.nan
    found, residuals = median_polish(table)
    assert found - found[0] == pytest.approx(columns)
    assert residuals[2, 3] == pytest.approx(50)
    residuals[2, 3] = 0
    assert np.nanmax(np.abs(residuals)) < 1e-9


@pytest.mark.parametrize("experiment", ["10-batch", "11-prediction"])
def test_committed_plans_are_read(experiment, pytestconfig):
    path = pytestconfig.rootpath / "experiments" / experiment / "plan.json"
    best = Plan.read(json.loads(path.read_text())).choice
    wanted = best.predicted_tau * best.plain_step_ms / best.step_ms.wall
    assert best.predicted_speedup == pytest.approx(wanted)
    assert best.predicted_speedup_ci[0] < best.predicted_speedup < best.predicted_speedup_ci[1]
