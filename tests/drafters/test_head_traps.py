"""Traps that published drafters fell into."""

import pytest
import torch
from scripted import DRAFTERS, PROMPTS, VOCAB, decoded, lively_head, small_target

from specdec import SamplingConfig, generate, generate_baseline
from specdec.drafters.tree_growth import TreeShape

# Paths of different lengths, whose padding must not pass for a token.
CHOICES = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]


def steps_that_accept(head, target):
    """Tokens accepted in the first steps on a target that always says 0, though features differ."""
    with torch.no_grad():
        target.model.lm_head.weight.zero_()
    drafter_class = next(each for each in DRAFTERS.values() if isinstance(head, each.head_class))
    drafter = drafter_class(head, VOCAB, TreeShape(choices=CHOICES))
    results = generate(target, drafter, PROMPTS, max_new_tokens=40)
    assert all(result.tokens == [0] * 40 for result in results)
    return [record.num_accepted for result in results for record in result.records[:4]]


@pytest.mark.parametrize(
    ("said", "num_accepted"), [((0, 5, 0), 1), ((5, 0, 0), 0), ((0, 0, 5), 2), ((0, 0, 0), 3)]
)
def test_token_zero_is_no_padding(said, num_accepted):
    """Head k is sure of said[k], and of the token behind it if that is wrong."""
    target = small_target()
    head = lively_head("medusa", target, num_heads=len(said))
    logits = torch.zeros(len(said), VOCAB)
    for k, token in enumerate(said):
        logits[k, token], logits[k, token + 1] = 9, 5
    head.forward = lambda feature, num_heads: logits.expand(*feature.shape[:-1], -1, -1)
    assert set(steps_that_accept(head, target)) == {num_accepted}


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_token_zero_is_accepted_to_full_depth(kind):
    target = small_target()
    head = lively_head(kind, target)
    head.logits = lambda outputs: torch.arange(VOCAB, 0, -1.0).expand(*outputs.shape[:-1], -1)
    assert set(steps_that_accept(head, target)) == {3}


BANNED = SamplingConfig(temperature=1.0, bad_words=[[token] for token in range(4)])


@pytest.mark.parametrize("children", ["top", "without_replacement", "with_replacement"])
@pytest.mark.parametrize(
    ("choices", "width"), [(CHOICES, 3), (None, 3), (None, 1)], ids=["static", "computed", "chain"]
)
def test_banned_draft_vocabulary_still_decodes(children, choices, width):
    target = small_target()
    head = lively_head("eagle3", target, draft_tokens=[0, 1, 2, 3])
    shape = TreeShape(depth=3, width=width, max_nodes=9, choices=choices, children=children)
    draft = decoded(head, target, shape, 1, sampling=[BANNED]).steps[0].draft
    reported = draft.confidence if draft.probs is None else draft.probs
    assert reported[draft.real_nodes()].isfinite().all()
    drafter = DRAFTERS["eagle3"](head, VOCAB, shape)
    greedy = SamplingConfig(bad_words=BANNED.bad_words)
    ours = generate(target, drafter, PROMPTS, greedy, max_new_tokens=12)
    plain = generate_baseline(target, PROMPTS, greedy, max_new_tokens=12)
    assert [result.tokens for result in ours] == [result.tokens for result in plain]
    for result in generate(target, drafter, PROMPTS, BANNED, max_new_tokens=12):
        assert len(result.tokens) == 12
        assert min(result.tokens) > 3
