"""Sampled children: the q that is reported is the head's own law, and tokens are drawn from it.

The laws are worked out plainly from the published heads (`slow_heads.py`) and the definition of
drawing with and without replacement; what was drawn is taken from the draft.
"""

from collections import Counter
from itertools import product

import pytest
import scipy.stats
import torch
from scripted import (
    DRAFTERS,
    VOCAB,
    decoded,
    lively_head,
    slow_guesses,
    small_target,
    true_features,
)
from slow_trees import drafted_nodes, law, penalised

from specdec import SamplingConfig
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.interfaces import TargetOutput
from specdec.sampling.sampler import Sampler

CHOICES = [[0], [1], [2], [0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [0, 0, 0], [0, 0, 1], [2, 0, 0]]
DRAFT_TOKENS = [0, 1, 2, 4, 5, 7, 8, 11, 12, 16]
HEADS = {
    "medusa": ("medusa", {}),
    "eagle": ("eagle", {}),
    "eagle3": ("eagle3", {}),
    "eagle3, draft vocabulary": ("eagle3", {"draft_tokens": DRAFT_TOKENS}),
}
SETTINGS = {
    "hot": [SamplingConfig(temperature=1.2)],
    "each row its own": [
        SamplingConfig(temperature=1.3, top_k=2),
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=0.9, repetition_penalty=1.7),
        SamplingConfig(temperature=1.1, top_p=0.8),
    ],
}


def without(probs, tokens):
    """A law {token: probability} given that these tokens are gone; empty if nothing is left."""
    left = {token: prob for token, prob in probs.items() if token not in tokens and prob > 0}
    total = sum(left.values())
    return {token: prob / total for token, prob in left.items()}


def row_law(config, guesses, committed, path):
    """The head's logits after a path, processed by a row's settings."""
    logits = guesses.logits(path)
    if config.repetition_penalty != 1:
        logits = penalised(logits, {*committed, *path}, config.repetition_penalty)
    return law(logits, config.temperature, config.top_k or 0, config.top_p)


def expected_laws(probs_behind, choices, budget, is_replaced, nodes, parents):
    """The law of every node of a draft whose tokens are `nodes`, in its order.

    A node is missing where its parent is, or where the draws before it left nothing.
    """
    made, laws = {(): ((), -1)}, []
    for ranks in sorted(map(tuple, choices), key=lambda ranks: (len(ranks), ranks))[:budget]:
        if ranks[:-1] not in made:
            continue
        above, parent = made[ranks[:-1]]
        siblings = [made.get((*ranks[:-1], rank)) for rank in range(ranks[-1])]
        gone = {node[0][-1] for node in siblings if node}
        probs = without(probs_behind(above), () if is_replaced else gone)
        if not probs:
            continue
        path = nodes[len(laws)]
        assert path[:-1] == above
        assert parents[len(laws)] == parent
        made[ranks] = (path, len(laws))
        laws.append(probs)
    assert len(laws) == len(nodes)
    return laws


@pytest.mark.parametrize("children", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", HEADS)
def test_reported_distribution_is_given_earlier_draws(name, settings, children):
    kind, options = HEADS[name]
    target, sampling = small_target(), SETTINGS[settings]
    head = lively_head(kind, target, seed=3, **options)
    decoding = decoded(
        head,
        target,
        TreeShape(choices=CHOICES, children=children),
        budget=lambda step: [11, 11, 11, 6] if step % 2 else None,
        sampling=sampling,
    )
    num_missing = 0
    for step in decoding.steps:
        for row, committed in enumerate(step.committed):
            guesses = slow_guesses(kind, head, target, committed)
            config = sampling[row % len(sampling)]
            nodes = [path for path, _ in drafted_nodes(step.draft, row)]
            laws = expected_laws(
                lambda path: row_law(config, guesses, committed, path),  # noqa: B023
                CHOICES,
                step.budget[row],
                children == "with_replacement",
                nodes,
                step.draft.explicit_parents()[row].tolist(),
            )
            num_missing += step.budget[row] - len(nodes)
            for probs, reported, path in zip(laws, step.draft.probs[row], nodes, strict=False):
                expected = torch.zeros(VOCAB)
                expected[list(probs)] = torch.tensor(list(probs.values()))
                torch.testing.assert_close(reported, expected, atol=2e-5, rtol=1e-3)
                assert reported[path[-1]] > 0
    runs_out = settings == "each row its own" and children == "without_replacement"
    assert (num_missing > 0) == runs_out
    assert max(decoding.num_accepted) > 1


def test_left_out_rank_is_drawn_all_the_same():
    target = small_target()
    head = lively_head("eagle", target)
    shape = TreeShape(choices=[[1], [3], [1, 2]], children="without_replacement")
    step = decoded(head, target, shape, 1, sampling=[SamplingConfig(temperature=1.2)]).steps[0]
    draft = step.draft
    for row, committed in enumerate(step.committed):
        guesses = slow_guesses("eagle", head, target, committed)
        nodes = [path for path, _ in drafted_nodes(draft, row)]
        assert len(nodes) == 3
        for path, reported, num_gone in zip(nodes, draft.probs[row], (1, 3, 2), strict=True):
            gone = (reported == 0).nonzero().flatten().tolist()
            assert len(gone) == num_gone
            assert path[-1] not in gone
            probs = without(law(guesses.logits(path[:-1]), 1.2), gone)
            assert reported[list(probs)].tolist() == pytest.approx(list(probs.values()), rel=1e-3)
        assert draft.probs[row][1][nodes[0][-1]] == 0, "the sibling's token can come twice"


@pytest.mark.parametrize("children", ["with_replacement", "without_replacement"])
def test_rows_at_temperature_zero_draft_the_likeliest_children(children):
    target = small_target()
    head = lively_head("eagle3", target, draft_tokens=DRAFT_TOKENS)
    sampled, chosen = (
        decoded(head, target, TreeShape(choices=CHOICES, children=each), 1).steps[0].draft
        for each in (children, "top")
    )
    assert sampled.probs is None
    assert sampled.tokens.tolist() == chosen.tokens.tolist()


NUM_SAMPLES, FEW = 6000, 5
SHORT = [[0], [1], [0, 0], [1, 0]]


@pytest.mark.parametrize("children", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("name", ["medusa", "eagle", "eagle3, draft vocabulary"])
def test_siblings_are_drawn_from_their_distributions(name, children):
    kind, _ = HEADS[name]
    target, prompt = small_target(FEW), [1, 3, 0, 2, 4, 4]
    options = {"draft_tokens": [0, 1, 3, 4]} if kind == "eagle3" else {}
    head = lively_head(kind, target, seed=3, **options)
    drafter = DRAFTERS[kind](head, FEW, TreeShape(choices=SHORT, children=children))
    prompts, config = [prompt] * NUM_SAMPLES, SamplingConfig(temperature=1.5)
    hidden = {
        tap: states.expand(NUM_SAMPLES, -1, -1)
        for tap, states in true_features(target, prompt, drafter.taps).items()
    }
    configs = [SamplingConfig(temperature=1.5, seed=seed) for seed in range(NUM_SAMPLES)]
    sampler = Sampler(configs, FEW, None, prompts, ())
    with torch.inference_mode():
        drafter.begin(prompts, TargetOutput(torch.empty(0), hidden), sampler)
        root = torch.full((NUM_SAMPLES,), prompt[-1])
        draft = drafter.propose(root, [len(SHORT)] * NUM_SAMPLES, sampler)
    assert draft.lengths.tolist() == [len(SHORT)] * NUM_SAMPLES

    guesses, expected = slow_guesses(kind, head, target, prompt), Counter()

    def probs(path=(), gone=()):
        return without(row_law(config, guesses, prompt, path), gone)

    for first, second in product(probs(), repeat=2):
        gone = (first,) if children == "without_replacement" else ()
        if second not in probs(gone=gone):
            continue
        share = probs()[first] * probs(gone=gone)[second]
        for below in product(probs((first,)), probs((second,))):
            both = probs((first,))[below[0]] * probs((second,))[below[1]]
            expected[first, second, *below] += share * both * NUM_SAMPLES
    assert sum(expected.values()) == pytest.approx(NUM_SAMPLES)

    counts = Counter(map(tuple, draft.tokens.tolist()))
    assert set(counts) <= set(expected)
    common = [draws for draws, number in expected.items() if number >= 5]
    observed = [counts[draws] for draws in common]
    wanted = [expected[draws] for draws in common]
    observed.append(NUM_SAMPLES - sum(observed))
    wanted.append(NUM_SAMPLES - sum(wanted))
    assert len(common) > 30
    assert scipy.stats.power_divergence(observed, wanted, lambda_="log-likelihood").pvalue > 1e-3
