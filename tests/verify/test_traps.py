"""The float and bias traps of the verification contract, one test each."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, match, typical, verify
from specdec.verify.residual import draw, strike

LARGEST = 1 - 2.0**-24  # the largest float32 uniform
LOSSLESS = ("token", "block", "traversal")


def _chain(*tokens: int, probs: torch.Tensor | None = None) -> Draft:
    return Draft.chain(torch.tensor([tokens]), probs=probs)


@pytest.mark.parametrize("rule", LOSSLESS)
def test_uniform_zero_rejects_impossible_tokens(rule):
    target = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    verdict = verify(
        target, _chain(0), rule=rule, uniforms=torch.zeros(1, 1), noise=torch.ones(1, 2)
    )
    assert verdict.num_accepted.tolist() == [0]
    assert verdict.tokens.tolist() == [[1, -1]]


@pytest.mark.parametrize("rule", LOSSLESS)
def test_largest_uniform_accepts_an_equal_draft(rule):
    rows = torch.softmax(torch.randn(64, 5, 50, generator=torch.Generator().manual_seed(0)), 2)
    tokens = rows[:, :4].argmin(2)  # small probabilities: the ratio must be 1 all the same
    draft = Draft.chain(tokens, probs=rows[:, :4])
    uniforms = torch.full((64, 4), LARGEST)
    verdict = verify(rows, draft, rule=rule, uniforms=uniforms, noise=torch.ones(64, 50))
    assert verdict.num_accepted.tolist() == [4] * 64


def test_largest_uniform_accepts_an_equal_tree():
    row = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)), 0)
    target = row.expand(1, 4, 50)
    draft = Draft.tree(
        torch.tensor([[3, 4, 5]]), torch.tensor([-1, -1, 0]), depth=2, probs=target[:, :3]
    )
    uniforms = torch.full((1, 3), LARGEST)
    for rule in ("token", "traversal"):
        verdict = verify(target, draft, rule=rule, uniforms=uniforms, noise=torch.ones(1, 50))
        assert verdict.path.tolist() == [[0, 2]]


def test_block_keeps_a_certain_prefix():
    # s + 1 - a instead of s + (1 - a) rounds the first node's 1 below the largest uniform for some
    # of these small s.
    small = torch.linspace(1e-4, 2e-4, 64)
    even = torch.full((64, 2), 0.5)
    target = torch.stack((even, torch.stack((0.5 - small, 0.5 + small), 1), even), 1)
    draft = Draft.chain(torch.zeros(64, 2, dtype=torch.long), probs=torch.stack((even, even), 1))
    uniforms = torch.full((64, 2), LARGEST)
    for rule in ("block", "traversal"):
        verdict = verify(target, draft, rule=rule, uniforms=uniforms, noise=torch.ones(64, 2))
        assert verdict.num_accepted.tolist() == [1] * 64


def test_no_noise_draws_a_token_of_probability_zero():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7]])
    assert draw(weights, torch.zeros(1, 4)).item() in (1, 3)
    assert draw(weights, torch.tensor([[0.0, 5.0, 0.0, 1.0]])).item() == 3
    assert draw(weights, torch.tensor([[1e-30, 40.0, 1e-30, 40.0]])).item() == 3


@pytest.mark.parametrize("as_tree", [False, True])
def test_zero_residual_falls_back_to_target(as_tree):
    # q covers p everywhere, as rounding can make it: rejecting leaves nothing.
    target = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    draft = _chain(0, probs=torch.tensor([[[0.5, 0.75]]], dtype=torch.float64))
    if as_tree:
        draft = replace(draft, parents=torch.tensor([[-1]]))
    verdict = verify(
        target, draft, uniforms=torch.full((1, 1), 0.9), noise=torch.ones(1, 2), check=False
    )
    assert verdict.tokens.tolist() == [[1, -1]]


def test_zero_residual_of_siblings_falls_back():
    target = torch.tensor([[[0.3, 0.7, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    draft = Draft.tree(torch.tensor([[0, 1]]), torch.tensor([-1, -1]), depth=1)
    row = target[:, 0].clone()
    everything = torch.tensor([[True, True]])
    assert strike(row, draft.tokens, everything).tolist() == target[:, 0].tolist()


@pytest.mark.parametrize("as_tree", [False, True])
@pytest.mark.parametrize("rule", ["block", "traversal"])
def test_certain_node_without_residual_is_kept(rule, as_tree):
    # Node 0 is certain, and q covers its row as rounding can make it: S = 0 and a = 1.
    even = [0.5, 0.5]
    target = torch.tensor([[even, [0.25, 0.75], even]], dtype=torch.float64)
    draft = _chain(0, 0, probs=torch.tensor([[even, [0.5, 0.75]]], dtype=torch.float64))
    if as_tree:
        draft = replace(draft, parents=torch.tensor([[-1, 0]]))
    uniforms, noise = torch.full((1, 2), 0.9), torch.ones(1, 2)
    verdict = verify(target, draft, rule=rule, uniforms=uniforms, noise=noise, check=False)
    assert verdict.tokens.tolist() == [[0, 1, -1]]


def test_repeated_sibling_is_never_accepted_again():
    target = torch.tensor([[[0.4, 0.3, 0.3]] * 4])
    draft = Draft.tree(torch.tensor([[0, 0, 1]]), torch.tensor([-1, -1, -1]), depth=1)
    uniforms = torch.tensor([[0.5, 0.0, 0.4]])  # the third is judged by 0.3 / 0.6
    for rule in ("token", "traversal"):
        verdict = verify(target, draft, rule=rule, uniforms=uniforms, noise=torch.ones(1, 3))
        assert verdict.path.tolist() == [[2]]


def test_match_follows_first_of_repeated_siblings():
    draft = Draft.tree(torch.tensor([[5, 5, 7]]), torch.tensor([-1, -1, 1]), depth=2)
    verdict = match(torch.tensor([[5, 1, 7, 2]]), draft)
    assert verdict.path.tolist() == [[0, -1]]
    assert verdict.tokens.tolist() == [[5, 1, -1]]


def test_distant_siblings_are_judged_in_order():
    target = torch.tensor([[[0.5, 0.5, 0.0]] * 4])
    draft = Draft.tree(torch.tensor([[0, 2, 1]]), torch.tensor([-1, 0, -1]), depth=2)
    verdict = verify(
        target, draft, uniforms=torch.tensor([[0.9, 0.0, 0.9]]), noise=torch.ones(1, 3)
    )
    assert verdict.path.tolist() == [[2, -1]]
    assert verdict.tested.tolist() == [[True, False, True]]


def test_residual_ignores_tokens_elsewhere_in_the_tree():
    # Token 1 is the rejected child of the root and also the child of a node that is off the path.
    target = torch.tensor([[[0.0, 0.4, 0.6], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]])
    draft = Draft.tree(torch.tensor([[0, 1]]), torch.tensor([-1, 0]), depth=2)
    noise = torch.tensor([[1.0, 0.1, 1.0]])
    verdict = verify(target, draft, uniforms=torch.zeros(1, 2), noise=noise)
    assert verdict.tokens.tolist() == [[1, -1, -1]]


def test_tested_is_the_children_judged_along_the_path():
    target = torch.full((1, 6, 4), 0.25)
    draft = Draft.tree(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([-1, -1, -1, 1, 1]), depth=2)
    uniforms = torch.tensor([[0.9, 0.1, 0.0, 0.9, 0.9]])
    verdict = verify(target, draft, uniforms=uniforms, noise=torch.ones(1, 4))
    assert verdict.path.tolist() == [[1, -1]]
    assert verdict.tested.tolist() == [[True, True, False, True, True]]


def test_traversal_tests_subtrees_before_the_accepted_node():
    target = torch.full((1, 6, 4), 0.25)
    parents = torch.tensor([-1, -1, 0, 1, 1])  # judged as 2, 0, 3, 4, 1
    draft = Draft.tree(torch.tensor([[0, 1, 2, 0, 1]]), parents, depth=2)
    uniforms = torch.tensor([[0.99, 0.0, 0.99, 0.001, 0.0]])
    verdict = verify(target, draft, rule="traversal", uniforms=uniforms, noise=torch.ones(1, 4))
    assert verdict.path.tolist() == [[1, 3]]
    assert verdict.tested.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("vocab_size", [32_000, 128_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_vocabularies_pass_in_every_dtype(vocab_size, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack(
        (torch.zeros(3, vocab_size), torch.randn(3, vocab_size, generator=generator))
    )
    target = torch.softmax(logits, 2).to(dtype)
    draft = Draft.chain(target[:, :2].argmax(2), probs=target[:, :2])
    for rule in (*LOSSLESS, "typical"):
        verdict = verify(
            target,
            draft,
            rule=rule,
            uniforms=torch.full((2, 2), 0.99),
            noise=torch.ones(2, vocab_size),
        )
        if rule != "typical":
            assert verdict.num_accepted.tolist() == [2, 2]


def test_typical_keeps_longest_then_likeliest_path():
    target = torch.tensor([[[0.5, 0.4, 0.1, 0.0]] * 6])
    parents = torch.tensor([-1, -1, 0, 1, 1])
    draft = Draft.tree(torch.tensor([[0, 1, 3, 1, 0]]), parents, depth=2)
    verdict = verify(target, draft, rule="typical", noise=torch.ones(1, 4))
    assert verdict.path.tolist() == [[1, 4]]
    assert verdict.tokens.tolist() == [[1, 0, 0]]


def test_typical_threshold_is_the_smaller_term():
    target = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])  # exp(-entropy) = 0.5
    draft = _chain(0)
    noise = torch.ones(1, 2)
    lenient = verify(target, draft, rule=typical(epsilon=0.9, alpha=0.98), noise=noise)
    strict = verify(target, draft, rule=typical(epsilon=0.9, alpha=1.02), noise=noise)
    assert (lenient.num_accepted.item(), strict.num_accepted.item()) == (1, 0)


def test_one_hot_rows_need_no_randomness():
    target = torch.nn.functional.one_hot(torch.tensor([[2, 1, 0]]), 3).float()
    for rule in (*LOSSLESS, "typical"):
        verdict = verify(target, _chain(2, 2), rule=rule)
        assert verdict.tokens.tolist() == [[2, 1, -1]]
    tree = Draft.tree(torch.tensor([[0, 2, 1, 0]]), torch.tensor([-1, -1, 1, 1]), depth=2)
    greedy = torch.nn.functional.one_hot(torch.tensor([[2, 0, 1, 0, 2]]), 3).float()
    for rule in ("token", "traversal", "typical"):
        assert verify(greedy, tree, rule=rule).tokens.tolist() == [[2, 1, 0]]


def test_an_empty_draft_decodes_one_token_plainly():
    target = torch.tensor([[[0.1, 0.9]], [[0.8, 0.2]]])
    for rule in (*LOSSLESS, "typical"):
        verdict = verify(target, Draft.empty(2), rule=rule, noise=torch.ones(2, 2))
        assert verdict.tokens.tolist() == [[1], [0]]
    assert match(torch.tensor([[4], [7]]), Draft.empty(2)).tokens.tolist() == [[4], [7]]


def test_depth_may_exceed_the_true_depth():
    target = torch.nn.functional.one_hot(torch.tensor([[2, 1, 0]]), 3).float()
    for parents in (None, torch.tensor([[-1, 0]])):
        draft = replace(_chain(2, 1), depth=4, parents=parents)
        expected = [[2, 1, 0, -1, -1]]
        assert verify(target, draft).tokens.tolist() == expected
        assert match(torch.tensor([[2, 1, 0]]), draft).tokens.tolist() == expected
