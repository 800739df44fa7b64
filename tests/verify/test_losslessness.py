"""Every lossless rule emits the target's joint distribution, and is the rule of its paper."""

from functools import partial

import pytest
import torch
from verify_enumerator import enumerate_law

from specdec.verify import verify
from specdec.verify.conformance import (
    CHAIN_SHAPE,
    SIBLING_KINDS,
    TREE_SHAPES,
    Case,
    VerdictDistribution,
    World,
    build_case,
    emitted_joint,
    total_variation,
    verdict_distribution,
)

HORIZON = 4
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
PROCESSING = [(1.0, 1.0), (0.4, 0.8), (0.0, 1.0)]
COMBINATIONS = [
    (rule, shape, kind)
    for rule in ("token", "block", "traversal")
    for shape in (CHAIN_SHAPE, *TREE_SHAPES)
    for kind in SIBLING_KINDS
    if rule != "block" or shape == CHAIN_SHAPE
]


def _law_of_row(case: Case, law: VerdictDistribution, row: int) -> dict[tuple[int, ...], float]:
    tokens = case.draft.tokens[row].tolist()
    emitted: dict[tuple[int, ...], float] = {}
    for path, prob, last in zip(
        law.paths[row].tolist(), law.probs[row].tolist(), law.last_probs[row].tolist(), strict=True
    ):
        prefix = tuple(tokens[node] for node in path if node >= 0)
        for token, share in enumerate(last):
            emitted[(*prefix, token)] = emitted.get((*prefix, token), 0.0) + prob * share
    return emitted


def _expected_law(case: Case, rule: str, row: int) -> dict[tuple[int, ...], float]:
    draft = case.draft
    probs = None if draft.probs is None else draft.probs[row].tolist()
    target, tokens = case.target_probs[row].tolist(), draft.tokens[row].tolist()
    return enumerate_law(rule, target, probs, tokens, draft.explicit_parents()[row].tolist())


def _check(rule: str, shape: tuple, kind: str, dtype: torch.dtype, processing: tuple) -> None:
    generator = torch.Generator().manual_seed(len(kind) + 100 * PROCESSING.index(processing))
    target = World.random(3, HORIZON, generator, *processing).rounded(dtype)
    drafter = World.random(3, HORIZON, generator).rounded(dtype)
    case = build_case(target, drafter, shape, kind, dtype, as_chain=rule == "block")
    law = verdict_distribution(
        partial(verify, rule=rule, check=False), case.target_probs, case.draft
    )

    joint = emitted_joint(case, law, target)
    assert total_variation(joint, target.joint()) < TOLERANCE[dtype]

    textbook = torch.zeros_like(joint)
    for row in range(len(case.weights)):
        found, expected = _law_of_row(case, law, row), _expected_law(case, rule, row)
        for emitted in found.keys() | expected.keys():
            gap = abs(found.get(emitted, 0.0) - expected.get(emitted, 0.0))
            assert gap < TOLERANCE[dtype], (row, emitted)
        for emitted, prob in expected.items():
            textbook[emitted] += case.weights[row] * prob * target.continuation(emitted)
    assert total_variation(textbook, target.joint()) < TOLERANCE[dtype]


@pytest.mark.parametrize("processing", PROCESSING, ids=["plain", "cool-top-p", "greedy"])
@pytest.mark.parametrize(("rule", "shape", "kind"), COMBINATIONS)
def test_rule_equals_its_paper_and_keeps_distribution(rule, shape, kind, processing):
    _check(rule, shape, kind, torch.float64, processing)


@pytest.mark.parametrize(("rule", "shape", "kind"), COMBINATIONS)
def test_float32_keeps_the_joint_distribution_to_a_millionth(rule, shape, kind):
    _check(rule, shape, kind, torch.float32, PROCESSING[len(kind) % 2])


def _expected_accepted(rule: str, case: Case) -> float:
    law = verdict_distribution(
        partial(verify, rule=rule, check=False), case.target_probs, case.draft
    )
    accepted = (law.paths >= 0).sum(2)
    return (case.weights.unsqueeze(1) * law.probs * accepted).sum().item()


@pytest.mark.parametrize("seed", range(6))
def test_block_accepts_at_least_as_token(seed):
    generator = torch.Generator().manual_seed(seed)
    target, drafter = (World.random(3, HORIZON, generator) for _ in range(2))
    case = build_case(target, drafter, CHAIN_SHAPE, "independent", torch.float64, as_chain=True)
    assert _expected_accepted("block", case) >= _expected_accepted("token", case) - 1e-12


def test_block_accepts_strictly_more_somewhere():
    generator = torch.Generator().manual_seed(0)
    target, drafter = (World.random(3, HORIZON, generator) for _ in range(2))
    case = build_case(target, drafter, CHAIN_SHAPE, "independent", torch.float64, as_chain=True)
    assert _expected_accepted("block", case) > _expected_accepted("token", case) + 1e-3


@pytest.mark.parametrize(
    ("rule", "shape"),
    [("block", CHAIN_SHAPE), *(("traversal", shape) for shape in (CHAIN_SHAPE, *TREE_SHAPES))],
)
def test_deterministic_drafts_gain_nothing_from_block_or_traversal(rule, shape):
    generator = torch.Generator().manual_seed(3)
    target, drafter = (World.random(3, HORIZON, generator) for _ in range(2))
    case = build_case(target, drafter, shape, "deterministic", torch.float64, rule == "block")
    expected = _expected_accepted("token", case)
    assert _expected_accepted(rule, case) == pytest.approx(expected, abs=1e-12)


def test_traversal_can_lose_to_later_deep_sibling():
    generator = torch.Generator().manual_seed(1)
    target, drafter = (World.random(2, 5, generator, temperature=0.7) for _ in range(2))
    case = build_case(target, drafter, (-1, 0, 0, 2), "without replacement", torch.float64)
    assert _expected_accepted("traversal", case) < _expected_accepted("token", case) - 1e-3


def test_traversal_beats_token_on_a_balanced_tree():
    generator = torch.Generator().manual_seed(5)
    target, drafter = (World.random(3, HORIZON, generator) for _ in range(2))
    case = build_case(target, drafter, TREE_SHAPES[0], "without replacement", torch.float64)
    assert _expected_accepted("traversal", case) > _expected_accepted("token", case)


def test_traversal_on_a_chain_is_block():
    generator = torch.Generator().manual_seed(1)
    target, drafter = (World.random(3, HORIZON, generator) for _ in range(2))
    case = build_case(target, drafter, CHAIN_SHAPE, "independent", torch.float64)
    block = verdict_distribution(partial(verify, rule="block"), case.target_probs, case.draft)
    traversal = verdict_distribution(
        partial(verify, rule="traversal"), case.target_probs, case.draft
    )
    assert torch.allclose(block.probs, traversal.probs, rtol=0, atol=1e-14)
    assert torch.equal(block.paths, traversal.paths)
    possible = block.probs > 1e-12
    assert torch.allclose(block.last_probs[possible], traversal.last_probs[possible], atol=1e-12)
