"""Every lossless rule emits the target's joint distribution, and is the rule of its paper."""

from functools import cache, partial

import pytest
import torch
from verify_enumerator import enumerate_law

from specdec.verify import delayed_tree, from_choices, verify
from specdec.verify.conformance import (
    CHAIN_SHAPE,
    SIBLING_KINDS,
    TREE_SHAPES,
    build_case,
    emitted,
    emitted_joint,
    joint,
    random_world,
    total_variation,
    verdict_distribution,
)

HORIZON = 4
# Of its own: the kit's must not loosen the proof.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
PROCESSING = ((1.0, 1.0), (0.4, 0.8), (0.0, 1.0))  # temperature, top-p
DELAYED = tuple(from_choices(delayed_tree(1, 2, 3)).parents.tolist())
SHAPES = (CHAIN_SHAPE, *TREE_SHAPES)
COMBINATIONS = [
    (rule, shape, kind)
    for rule in ("token", "block", "traversal")
    for shape in (SHAPES if rule != "block" else [CHAIN_SHAPE])
    for kind in SIBLING_KINDS
]
COMBINATIONS += [(rule, DELAYED, "independent") for rule in ("token", "traversal")]


def worlds(seed, processing=(1.0, 1.0), dtype=torch.float64, vocab_size=3):
    """A target, processed as given, and a drafter."""
    generator = torch.Generator().manual_seed(seed)
    target = random_world(vocab_size, HORIZON, generator, dtype, *processing)
    return target, random_world(vocab_size, HORIZON, generator, dtype)


def verdicts_of(rule, case):
    return verdict_distribution(
        partial(verify, rule=rule, check=False), case.target_probs, case.draft
    )


@pytest.mark.parametrize(
    ("dtype", "processing"),
    [*((torch.float64, each) for each in PROCESSING), (torch.float32, None)],
    ids=["plain", "cool-top-p", "greedy", "float32"],
)
@pytest.mark.parametrize(("rule", "shape", "kind"), COMBINATIONS)
def test_rule_equals_its_paper_and_keeps_distribution(rule, shape, kind, dtype, processing):
    processing = processing or PROCESSING[len(kind) % 2]
    seed, vocab_size = len(kind) + 100 * PROCESSING.index(processing), 2 if shape == DELAYED else 3
    target, drafter = worlds(seed, processing, dtype, vocab_size)
    case = build_case(target, drafter, shape, kind, dtype, as_chain=rule == "block")
    verdicts = verdicts_of(rule, case)
    exact = joint(target)
    assert total_variation(emitted_joint(case, verdicts, target), exact) < TOLERANCE[dtype]

    textbook, parents = torch.zeros_like(exact), case.draft.explicit_parents().tolist()
    probs = None if case.draft.probs is None else case.draft.probs.tolist()
    rows = zip(case.target_probs.tolist(), case.draft.tokens.tolist(), parents, strict=True)
    after = cache(partial(joint, target))
    for row, (target_rows, tokens, above) in enumerate(rows):
        law = enumerate_law(rule, target_rows, probs and probs[row], tokens, above)
        found = emitted(case, verdicts, row)
        for prefix in found.keys() | law.keys():
            gap = abs(found.get(prefix, 0.0) - law.get(prefix, 0.0))
            assert gap < TOLERANCE[dtype], (row, prefix)
        for prefix, prob in law.items():
            textbook[prefix] += case.weights[row] * prob * after(prefix)
    assert total_variation(textbook, exact) < TOLERANCE[dtype]


def accepted(rule, case):
    """Expected number of accepted tokens."""
    verdicts = verdicts_of(rule, case)
    counts = (verdicts.paths >= 0).sum(2)
    return (case.weights.unsqueeze(1) * verdicts.probs * counts).sum().item()


@pytest.mark.parametrize("seed", range(6))
def test_block_accepts_at_least_as_token(seed):
    case = build_case(*worlds(seed), CHAIN_SHAPE, "independent", torch.float64, as_chain=True)
    more = accepted("block", case) - accepted("token", case)
    assert more >= (1e-3 if seed == 0 else -1e-12)


@pytest.mark.parametrize(
    ("rule", "shape"), [("block", CHAIN_SHAPE), *(("traversal", shape) for shape in SHAPES)]
)
def test_deterministic_drafts_gain_nothing_from_block_or_traversal(rule, shape):
    case = build_case(*worlds(3), shape, "deterministic", torch.float64, rule == "block")
    assert accepted(rule, case) == pytest.approx(accepted("token", case), abs=1e-12)


def test_traversal_can_lose_to_later_deep_sibling():
    generator = torch.Generator().manual_seed(1)
    pair = [random_world(2, 5, generator, temperature=0.7) for _ in range(2)]
    case = build_case(*pair, (-1, 0, 0, 2), "without replacement", torch.float64)
    assert accepted("traversal", case) < accepted("token", case) - 1e-3


def test_traversal_beats_token_on_a_balanced_tree():
    case = build_case(*worlds(5), TREE_SHAPES[0], "without replacement", torch.float64)
    assert accepted("traversal", case) > accepted("token", case)


@pytest.mark.parametrize("seed", range(4))
def test_traversal_gains_where_branches_wait_for_a_stem(seed):
    case = build_case(*worlds(seed, vocab_size=2), DELAYED, "independent", torch.float64)
    assert accepted("traversal", case) > accepted("token", case)


def test_traversal_on_a_chain_is_block():
    case = build_case(*worlds(1), CHAIN_SHAPE, "independent", torch.float64)
    block, traversal = verdicts_of("block", case), verdicts_of("traversal", case)
    assert torch.allclose(block.probs, traversal.probs, rtol=0, atol=1e-14)
    assert torch.equal(block.paths, traversal.paths)
    possible = block.probs > 1e-12
    assert torch.allclose(block.last_probs[possible], traversal.last_probs[possible], atol=1e-12)
