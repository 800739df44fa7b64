import numpy as np
import pytest

from specdec.planning.fit import fit_linear, fit_piecewise

TOKENS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def law(tokens, context):
    """Flat up to 8 tokens, then a slope; the context adds a little, more for many tokens."""
    return 4e-3 + 2e-4 * max(0, tokens - 8) + 1e-6 * context + 1e-8 * context * tokens


def grid(noise=0.0):
    rng = np.random.default_rng(0)
    points = [(n, c) for n in TOKENS for c in (64, 256, 1024)]
    times = [law(n, c) * (1 + noise * rng.standard_normal()) for n, c in points]
    return [n for n, _ in points], [c for _, c in points], times


def test_a_piecewise_linear_law_is_found_with_its_knot():
    fit = fit_piecewise(*grid())
    assert 8 in fit.knots
    assert fit.residuals.largest < 1e-6
    # Also between the points that were measured.
    assert fit(20, 500) == pytest.approx(law(20, 500), rel=1e-6)
    assert fit(5, 100) == pytest.approx(law(5, 100), rel=1e-6)


def test_residuals_show_the_noise_of_the_points():
    fit = fit_piecewise(*grid(noise=0.05))
    assert 0.02 < fit.residuals.rms < 0.08
    assert fit.residuals.largest >= fit.residuals.rms >= fit.residuals.median > 0


def test_noise_around_a_line_needs_few_knots():
    rng = np.random.default_rng(1)
    points = [(n, c) for n in TOKENS for c in (64, 256, 1024)]
    times = [(4e-3 + 1e-4 * n) * (1 + 0.03 * rng.standard_normal()) for n, _ in points]
    fit = fit_piecewise([n for n, _ in points], [c for _, c in points], times)
    assert len(fit.knots) <= 1


def test_a_single_point_is_its_own_fit():
    fit = fit_piecewise([1], [64], [3e-3])
    assert fit(1, 64) == pytest.approx(3e-3)


def test_times_and_tokens_must_be_as_many():
    with pytest.raises(ValueError, match="there are 1 times for 2 numbers of tokens"):
        fit_piecewise([1, 2], [64, 64], [3e-3])
    with pytest.raises(ValueError, match="0 times"):
        fit_piecewise([], [], [])


def test_a_sum_of_parts_is_found_again():
    rows = [(1, n, n * n) for n in range(1, 8)]
    times = [2e-3 + 5e-4 * n for n in range(1, 8)]
    fit = fit_linear(("step", "level", "square"), rows, times, times)
    assert fit.coefficients == pytest.approx((2e-3, 5e-4, 0.0), abs=1e-9)
    assert fit.residuals.largest < 1e-6


def test_no_part_makes_a_step_cheaper():
    fit = fit_linear(("step", "level"), [(1, 0), (1, 10)], [2e-3, 1e-3], [1e-3, 1e-3])
    assert min(fit.coefficients) >= 0
    assert fit.residuals.largest > 0.1


def test_means_of_many_measurements_weigh_more():
    rows, times = [(1,), (1,)], [1e-3, 2e-3]
    fit = fit_linear(("step",), rows, times, [1e-3, 1e-3], [99, 1])
    assert fit.coefficients[0] == pytest.approx(1.01e-3)
    # Errors are told against the whole step, however often it was measured.
    assert fit.residuals.largest == pytest.approx(0.99)
