"""The float and bias traps of the verification contract, one test each."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, match, typical, verify
from specdec.verify.residual import draw, strike

LARGEST = 1 - 2.0**-24  # the largest float32 uniform
LOSSLESS = ("token", "block", "traversal")
TREE_RULES = ("token", "traversal")
EVERY = (*LOSSLESS, "typical")


def chain(*tokens, probs=None):
    return Draft.chain(torch.tensor([tokens]), probs=probs)


def tree(tokens, parents, depth, probs=None):
    return Draft.tree(torch.tensor([tokens]), torch.tensor(parents), depth=depth, probs=probs)


def one_hot(*tokens):
    return torch.nn.functional.one_hot(torch.tensor([tokens]), 3).float()


def judge(target, draft, uniforms=0.0, rule="token", noise=1.0, **options):
    """Verify with uniforms and noise that may be one number for all."""
    batch_size, num_rows, vocab_size = target.shape
    return verify(
        target,
        draft,
        rule=rule,
        uniforms=torch.as_tensor(uniforms).expand(batch_size, num_rows - 1),
        noise=torch.as_tensor(noise).expand(batch_size, vocab_size),
        **options,
    )


def softmax_rows(*shape):
    return torch.softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), -1)


@pytest.mark.parametrize("rule", LOSSLESS)
def test_uniform_zero_rejects_impossible_tokens(rule):
    target = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    assert judge(target, chain(0), 0.0, rule).tokens.tolist() == [[1, -1]]


@pytest.mark.parametrize("rule", LOSSLESS)
def test_largest_uniform_accepts_an_equal_draft(rule):
    rows = softmax_rows(64, 5, 50)
    tokens = rows[:, :4].argmin(2)  # small probabilities: the ratio must be 1 all the same
    verdict = judge(rows, Draft.chain(tokens, probs=rows[:, :4]), LARGEST, rule)
    assert verdict.num_accepted.tolist() == [4] * 64
    if rule in TREE_RULES:
        target = softmax_rows(50).expand(1, 4, 50)
        draft = tree([3, 4, 5], [-1, -1, 0], 2, target[:, :3])
        assert judge(target, draft, LARGEST, rule).path.tolist() == [[0, 2]]


@pytest.mark.parametrize("rule", ["block", "traversal"])
def test_block_keeps_a_certain_prefix(rule):
    # s + 1 - a instead of s + (1 - a) rounds the first node's 1 below the largest uniform for some
    # of these small s.
    small = torch.linspace(1e-4, 2e-4, 64)
    even = torch.full((64, 2), 0.5)
    target = torch.stack((even, torch.stack((0.5 - small, 0.5 + small), 1), even), 1)
    draft = Draft.chain(torch.zeros(64, 2, dtype=torch.long), probs=torch.stack((even, even), 1))
    assert judge(target, draft, LARGEST, rule).num_accepted.tolist() == [1] * 64


def test_no_noise_draws_a_token_of_probability_zero():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7]])
    assert draw(weights, torch.zeros(1, 4)).item() in (1, 3)
    assert draw(weights, torch.tensor([[0.0, 5.0, 0.0, 1.0]])).item() == 3
    assert draw(weights, torch.tensor([[1e-30, 40.0, 1e-30, 40.0]])).item() == 3


@pytest.mark.parametrize("as_tree", [False, True])
def test_zero_residual_falls_back_to_target(as_tree):
    # q covers p everywhere, as rounding can make it: rejecting leaves nothing.
    target = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    draft = chain(0, probs=torch.tensor([[[0.5, 0.75]]], dtype=torch.float64))
    draft = replace(draft, parents=torch.tensor([[-1]]) if as_tree else None)
    assert judge(target, draft, 0.9, check=False).tokens.tolist() == [[1, -1]]


def test_zero_residual_of_siblings_falls_back():
    row = torch.tensor([[0.3, 0.7, 0.0]])
    struck = strike(row.clone(), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    assert struck.tolist() == row.tolist()


@pytest.mark.parametrize("as_tree", [False, True])
@pytest.mark.parametrize("rule", ["block", "traversal"])
def test_certain_node_without_residual_is_kept(rule, as_tree):
    # Node 0 is certain, and q covers its row as rounding can make it: S = 0 and a = 1.
    even = [0.5, 0.5]
    target = torch.tensor([[even, [0.25, 0.75], even]], dtype=torch.float64)
    draft = chain(0, 0, probs=torch.tensor([[even, [0.5, 0.75]]], dtype=torch.float64))
    draft = replace(draft, parents=torch.tensor([[-1, 0]]) if as_tree else None)
    assert judge(target, draft, 0.9, rule, check=False).tokens.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("rule", TREE_RULES)
def test_repeated_sibling_is_never_accepted_again(rule):
    draft = tree([0, 0, 1], [-1, -1, -1], 1)
    uniforms = torch.tensor([[0.5, 0.0, 0.4]])  # the third is judged by 0.3 / 0.6
    verdict = judge(torch.tensor([[[0.4, 0.3, 0.3]] * 4]), draft, uniforms, rule)
    assert verdict.path.tolist() == [[2]]


def test_match_follows_first_of_repeated_siblings():
    verdict = match(torch.tensor([[5, 1, 7, 2]]), tree([5, 5, 7], [-1, -1, 1], 2))
    assert verdict.path.tolist() == [[0, -1]]
    assert verdict.tokens.tolist() == [[5, 1, -1]]


def test_distant_siblings_are_judged_in_order():
    draft, uniforms = tree([0, 2, 1], [-1, 0, -1], 2), torch.tensor([[0.9, 0.0, 0.9]])
    verdict = judge(torch.tensor([[[0.5, 0.5, 0.0]] * 4]), draft, uniforms)
    assert verdict.path.tolist() == [[2, -1]]
    assert verdict.tested.tolist() == [[True, False, True]]


def test_residual_ignores_tokens_elsewhere_in_the_tree():
    # Token 1 is the rejected child of the root and also the child of a node that is off the path.
    target = torch.tensor([[[0.0, 0.4, 0.6], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]])
    verdict = judge(target, tree([0, 1], [-1, 0], 2), noise=torch.tensor([[1.0, 0.1, 1.0]]))
    assert verdict.tokens.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize(
    ("rule", "parents", "uniforms", "path", "tested"),
    [  # the children judged along the path; subtrees before the accepted node: 2, 0, 3, 4, 1
        ("token", [-1, -1, -1, 1, 1], [0.9, 0.1, 0.0, 0.9, 0.9], [1, -1], [1, 1, 0, 1, 1]),
        ("traversal", [-1, -1, 0, 1, 1], [0.99, 0.0, 0.99, 0.001, 0.0], [1, 3], [1, 1, 1, 1, 0]),
    ],
)
def test_tested_marks_the_judged_nodes(rule, parents, uniforms, path, tested):
    draft = tree([0, 1, 2, 0, 1], parents, 2)
    verdict = judge(torch.full((1, 6, 4), 0.25), draft, torch.tensor([uniforms]), rule)
    assert verdict.path.tolist() == [path]
    assert verdict.tested.int().tolist() == [tested]


@pytest.mark.parametrize("vocab_size", [32_000, 128_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_vocabularies_pass_in_every_dtype(vocab_size, dtype):
    noise = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    target = torch.softmax(torch.stack((torch.zeros(3, vocab_size), noise)), 2).to(dtype)
    draft = Draft.chain(target[:, :2].argmax(2), probs=target[:, :2])
    for rule in EVERY:
        verdict = judge(target, draft, 0.99, rule)
        assert rule == "typical" or verdict.num_accepted.tolist() == [2, 2]


def test_typical_keeps_longest_then_likeliest_path():
    target = torch.tensor([[[0.5, 0.4, 0.1, 0.0]] * 6])
    draft = tree([0, 1, 3, 1, 0], [-1, -1, 0, 1, 1], 2)
    verdict = judge(target, draft, rule="typical")
    assert verdict.path.tolist() == [[1, 4]]
    assert verdict.tokens.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("alpha", "expected"), [(0.98, 1), (1.02, 0)])
def test_typical_threshold_is_the_smaller_term(alpha, expected):
    target = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])  # exp(-entropy) = 0.5
    verdict = judge(target, chain(0), rule=typical(epsilon=0.9, alpha=alpha))
    assert verdict.num_accepted.item() == expected


@pytest.mark.parametrize("rule", EVERY)
def test_one_hot_rows_need_no_randomness(rule):
    assert verify(one_hot(2, 1, 0), chain(2, 2), rule=rule).tokens.tolist() == [[2, 1, -1]]
    if rule != "block":
        draft = tree([0, 2, 1, 0], [-1, -1, 1, 1], 2)
        assert verify(one_hot(2, 0, 1, 0, 2), draft, rule=rule).tokens.tolist() == [[2, 1, 0]]


def test_an_empty_draft_decodes_one_token_plainly():
    target = torch.tensor([[[0.1, 0.9]], [[0.8, 0.2]]])
    for rule in EVERY:
        assert judge(target, Draft.empty(2), rule=rule).tokens.tolist() == [[1], [0]]
    assert match(torch.tensor([[4], [7]]), Draft.empty(2)).tokens.tolist() == [[4], [7]]


@pytest.mark.parametrize("parents", [None, torch.tensor([[-1, 0]])])
def test_depth_may_exceed_the_true_depth(parents):
    draft = replace(chain(2, 1), depth=4, parents=parents)
    expected = [[2, 1, 0, -1, -1]]
    assert verify(one_hot(2, 1, 0), draft).tokens.tolist() == expected
    assert match(torch.tensor([[2, 1, 0]]), draft).tokens.tolist() == expected
