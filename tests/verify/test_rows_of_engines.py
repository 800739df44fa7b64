"""Rows that are judged by argmax, tokens that are sampled already, and layouts that split them."""

import pytest
import torch
from torch.nn.functional import one_hot

from specdec.verify import Draft, from_flat, target_from_flat, uniforms_from_flat, verify

B, N, V = 64, 4, 5
SHAPES = {"chain": None, "tree": [-1, -1, 0, 0], "deep tree": [-1, 0, 0, 2]}
CASES = [
    (rule, shape, is_sampled)
    for rule in ("token", "block", "traversal", "typical")
    for shape in SHAPES
    for is_sampled in (False, True)
    if shape == "chain" or rule != "block"
]


def problem(shape, is_sampled):
    """Ragged drafts that take a row's likeliest token about half of the time."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, N + 1, V, generator=generator)
    parents = SHAPES[shape] and torch.tensor(SHAPES[shape])
    rows = torch.arange(N) if parents is None else parents + 1
    order = logits[:, rows].argsort(2, descending=True)
    # Siblings hold different tokens: the best one in either place.
    swap = torch.rand(B, N, 1, generator=generator) < 0.3
    ranks = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])[swap[:, :1, 0].long().squeeze(1)]
    tokens = order.gather(2, ranks.unsqueeze(2) if shape != "chain" else swap.long()).squeeze(2)
    lengths = torch.randint(0, N + 1, (B,), generator=generator)
    probs = torch.softmax(torch.randn(B, N, V, generator=generator), 2) if is_sampled else None
    draft = Draft(tokens, lengths, None if parents is None else parents.expand(B, N), probs, N)
    randomness = {
        "uniforms": torch.rand(B, N, generator=generator),
        "noise": torch.empty(B, V).exponential_(generator=generator),
    }
    return logits, draft, randomness


def assert_same(found, expected):
    for name in ("tokens", "num_accepted", "path"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(("rule", "shape", "is_sampled"), CASES)
def test_greedy_rows_of_logits_are_judged_as_one_hot_rows(rule, shape, is_sampled):
    logits, draft, randomness = problem(shape, is_sampled)
    greedy = torch.arange(B) % 3 > 0
    one_hots, probs = one_hot(logits.argmax(2), V).float(), logits.softmax(2)
    mask = greedy.view(B, 1, 1)
    expected = verify(torch.where(mask, one_hots, probs), draft, rule=rule, **randomness)
    found = verify(torch.where(mask, logits, probs), draft, rule=rule, **randomness, greedy=greedy)
    assert_same(found, expected)
    # Both ends and some steps between are met.
    assert set(found.num_accepted[greedy].tolist()) >= {0, 1, 2}
    assert_same(
        verify(logits, draft, rule=rule, greedy=torch.ones(B).bool()),
        verify(one_hots, draft, rule=rule),
    )


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("rule", ["token", "block", "traversal", "typical"])
def test_sampled_bonus_tokens_are_one_hot_bonus_rows_that_nobody_reads(rule, is_sampled):
    logits, draft, randomness = problem("chain", is_sampled)
    logits[::2] *= 8  # so that whole chains are accepted in many rows
    greedy, rows = torch.arange(B) % 3 == 0, torch.arange(B)
    bonus, probs = torch.randint(0, V, (B,)), logits.softmax(2)
    probs[rows, draft.lengths] = one_hot(bonus, V).float()
    expected = verify(probs, draft, rule=rule, **randomness, greedy=greedy)
    probs[rows, draft.lengths] = torch.nan
    found = verify(probs, draft, rule=rule, **randomness, greedy=greedy, bonus_tokens=bonus)
    assert_same(found, expected)
    whole = (found.num_accepted == draft.lengths) & (draft.lengths > 0)
    assert 5 < whole.sum() < B - 5
    empty = verify(probs[:, :1], Draft.empty(B), rule=rule, bonus_tokens=bonus, check=False)
    assert torch.equal(empty.tokens[:, 0], bonus)


def test_rows_that_stand_apart_land_where_the_interleaved_ones_do():
    generator = torch.Generator().manual_seed(0)
    cumulative = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    together = torch.softmax(torch.randn(10, V, generator=generator), 1)
    is_bonus = torch.zeros(10).bool()
    is_bonus[cumulative + torch.arange(4)] = True
    expected = target_from_flat(together, cumulative, 3)
    real = torch.arange(4) <= torch.tensor([2, 0, 3, 1]).unsqueeze(1)
    apart, bonus = together[~is_bonus], together[is_bonus]
    assert torch.equal(target_from_flat(apart, cumulative, 3, bonus=bonus)[real], expected[real])
    drafted = torch.arange(4) < torch.tensor([2, 0, 3, 1]).unsqueeze(1)
    alone = target_from_flat(apart, cumulative, 3, bonus=False)
    assert torch.equal(alone[drafted], expected[drafted])
    assert alone.shape == expected.shape

    flat = torch.rand(6, generator=generator, dtype=torch.float64)
    uniforms = uniforms_from_flat(flat, cumulative, 3)
    assert torch.equal(uniforms[drafted[:, :3]], flat)
    nothing = torch.tensor([0, 0])
    assert target_from_flat(apart[:0], nothing, 2, bonus=False).shape == (2, 3, V)
    assert uniforms_from_flat(flat[:0], nothing, 2).shape == (2, 2)
    draft = from_flat(flat[:0].long(), nothing, max_len=2)
    rows = target_from_flat(apart[:0], nothing, 2, bonus=False)
    plain = verify(rows, draft, bonus_tokens=torch.tensor([3, 4]))
    assert plain.tokens.tolist() == [[3, -1, -1], [4, -1, -1]]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ("tree", {"bonus_tokens": torch.zeros(B).long()}, "bonus_tokens: a tree"),
        ("chain", {"bonus_tokens": torch.full((B,), V)}, "bonus_tokens: row 0 has 5"),
        ("chain", {"bonus_tokens": torch.zeros(B, 1).long()}, "bonus_tokens has shape"),
        ("chain", {"bonus_tokens": torch.zeros(B)}, "bonus_tokens is torch.float32"),
        ("chain", {"greedy": torch.zeros(B)}, "greedy is torch.float32"),
        ("chain", {"greedy": torch.arange(B) < 1}, "target_probs: row 1.*not negative"),
        ("chain", {"greedy": torch.ones(B).bool()}, "target_probs: row 2.*nan.*finite"),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, message):
    logits, draft, randomness = problem(shape, False)
    logits[2, 0, 1] = torch.nan
    with pytest.raises((ValueError, TypeError), match=message):
        verify(logits, draft, **randomness, **options)
