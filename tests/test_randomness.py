"""Counter-based randomness: right distributions, independent everywhere, no hidden state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specdec.sampling.randomness import row_exponentials, row_uniforms

DRAWS = (row_uniforms, row_exponentials)
UNIFORM_BITS = [
    [16518729, 11910081, 14571678],
    [8973705, 8812052, 14591820],
    [13178413, 4413082, 15976152],
]
int64 = st.integers(-(2**63), 2**63 - 1)


def rows(*values: int) -> torch.LongTensor:
    return torch.tensor(values)


def uniforms_of(seeds, counters, size: int, stream: int = 0) -> torch.Tensor:
    seeds, counters = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(counters))
    return row_uniforms(seeds.flatten(), counters.flatten(), stream, size).double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_golden_values_pin_later_releases():
    uniforms = row_uniforms(rows(0, 1, 2**63 - 1), rows(0, 5, 10**9), 3, 3)
    exponentials = row_exponentials(rows(0, 1, 2**63 - 1), rows(0, 5, 10**9), 3, 3)
    assert (uniforms * 2**24).long().tolist() == UNIFORM_BITS
    torch.testing.assert_close(exponentials, -torch.log1p(-uniforms), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("axis", ["columns", "rows", "counters"])
def test_uniforms_are_uniform_along_every_axis(axis):
    """Two levels: over many keys the p-values are uniform themselves, so no key is picked."""
    n, line = 1 << 13, torch.arange(1 << 13)
    along = {
        "columns": lambda key: uniforms_of([key], [11], n),
        "rows": lambda key: uniforms_of(line, key, 1),
        "counters": lambda key: uniforms_of(key, line, 1),
    }[axis]
    ks, chi_square = [], []
    for key in range(200):
        drawn = along(key).flatten()
        ks.append(stats.kstest(drawn.numpy(), "uniform").pvalue)
        counts = torch.histc(drawn, bins=64, min=0, max=1)
        chi_square.append(stats.chisquare(counts.numpy()).pvalue)
    assert stats.kstest(ks, "uniform").pvalue > 1e-3
    assert stats.kstest(chi_square, "uniform").pvalue > 1e-3
    assert min(ks + chi_square) > 1e-5


def test_every_bit_of_the_uniforms_is_fair():
    mantissa = (uniforms_of(torch.arange(256), 3, 512) * 2**24).long()
    ones = torch.stack([(mantissa >> bit & 1).double().mean() for bit in range(24)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / (256 * 512) ** 0.5


def test_exponentials_are_exp_1_at_large_vocabularies():
    vocab = 128_000
    noise = row_exponentials(torch.arange(40), torch.full((40,), 9), 1, vocab).double()
    assert stats.kstest(noise[0].numpy(), "expon").pvalue > 1e-3
    smallest = noise.amin(-1) * vocab  # the minimum of V Exp(1) draws is Exp(1) / V
    assert stats.kstest(smallest.numpy(), "expon").pvalue > 1e-3
    assert noise.min() > 0
    between = (noise.amin(-1) * 2**24).frac()  # 24-bit uniforms would leave only whole numbers
    assert stats.kstest(between.numpy(), "uniform").pvalue > 1e-3


def test_neighboring_draws_are_uncorrelated():
    n, bound = 1 << 10, 5 / (1 << 10)  # five standard errors of n * n samples
    seeds = torch.arange(n + 1)
    by_seed = uniforms_of(seeds, 3, n)
    by_counter = uniforms_of(3, seeds, n)
    assert abs(correlation(by_seed[1:], by_seed[:-1])) < bound
    assert abs(correlation(by_counter[1:], by_counter[:-1])) < bound
    assert abs(correlation(by_seed[:, 1:], by_seed[:, :-1])) < bound
    assert abs(correlation(by_seed[1:, 1:], by_seed[:-1, :-1])) < bound
    assert abs(correlation(by_seed, by_counter)) < bound
    assert abs(correlation(by_seed, uniforms_of(seeds, 3, n, stream=1))) < bound
    assert abs(correlation(by_seed, uniforms_of(seeds, 4, n))) < bound


def test_neighboring_columns_fill_the_square():
    drawn = uniforms_of(torch.arange(64), 2, 4096)
    cells = (drawn[:, :-1] * 16).long() * 16 + (drawn[:, 1:] * 16).long()
    counts = torch.bincount(cells[:, ::2].flatten(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("draw", DRAWS)
@settings(max_examples=50, deadline=None)
@given(
    batch=st.lists(st.tuples(int64, int64), min_size=1, max_size=6),
    stream=st.integers(0, 2**70),
    size=st.integers(1, 40),
    longer=st.integers(0, 40),
)
def test_row_draws_do_not_depend_on_batch(draw, batch, stream, size, longer):
    seeds, counters = torch.tensor(batch).unbind(-1)
    together = draw(seeds, counters, stream, size + longer)
    for row in range(len(batch)):
        alone = draw(seeds[row : row + 1], counters[row : row + 1], stream, size)
        assert torch.equal(together[row, :size], alone[0])


@pytest.mark.parametrize("draw", DRAWS)
def test_global_random_state_is_untouched(draw):
    before = torch.random.get_rng_state()
    first = draw(rows(1), rows(2), 0, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(draw(rows(1), rows(2), 0, 8), first)


def test_arguments_stay_unchanged():
    seeds, counters = rows(1, 2), rows(3, 4)
    row_exponentials(seeds, counters, 0, 4)
    assert seeds.tolist() == [1, 2]
    assert counters.tolist() == [3, 4]


@pytest.mark.parametrize("draw", DRAWS)
def test_empty_draw_has_no_columns(draw):
    assert draw(rows(1, 2), rows(0, 0), 0, 0).shape == (2, 0)


@pytest.mark.parametrize("draw", DRAWS)
def test_wrong_arguments_are_named(draw):
    with pytest.raises(ValueError, match="counters has shape"):
        draw(rows(1, 2), rows(1), 0, 4)
    with pytest.raises(ValueError, match="size is -1"):
        draw(rows(1), rows(1), 0, -1)
    with pytest.raises(TypeError, match="seeds must be int64"):
        draw(rows(1).int(), rows(1), 0, 4)


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_numbers():
    seeds, counters = torch.arange(8), torch.arange(8) * 1000
    on_gpu = (seeds.cuda(), counters.cuda(), 2, 128_000)
    assert torch.equal(row_uniforms(*on_gpu).cpu(), row_uniforms(seeds, counters, 2, 128_000))
    gpu, cpu = row_exponentials(*on_gpu).cpu(), row_exponentials(seeds, counters, 2, 128_000)
    torch.testing.assert_close(gpu, cpu, rtol=2**-23, atol=0)
    assert (gpu != cpu).double().mean() < 1e-6
