"""Traps that published drafters fell into."""

import pytest
import torch
from scripted import (
    DRAFTERS,
    PROMPTS,
    VOCAB,
    ScriptedDecoding,
    lively_head,
    small_target,
)
from tiny_models import tiny_target

from specdec import SamplingConfig, generate, generate_baseline
from specdec.drafters.tree_growth import TreeShape

# Paths of different lengths, whose padding must not pass for a token.
CHOICES = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]


def target_that_says_zero():
    """A target whose argmax is token 0 everywhere, though its features differ."""
    target = tiny_target(VOCAB, num_layers=3)
    with torch.no_grad():
        target.model.lm_head.weight.zero_()
    return target


def heads_that_say(target, tokens):
    """Medusa heads: head k is sure of tokens[k], and of the token behind it if that is wrong."""
    head = lively_head("medusa", target, num_heads=len(tokens))
    logits = torch.zeros(len(tokens), VOCAB)
    for k, token in enumerate(tokens):
        logits[k, token], logits[k, token + 1] = 9, 5
    head.forward = lambda feature, num_heads: logits.expand(*feature.shape[:-1], -1, -1)
    return head


@pytest.mark.parametrize(
    ("said", "num_accepted"), [((0, 5, 0), 1), ((5, 0, 0), 0), ((0, 0, 5), 2), ((0, 0, 0), 3)]
)
def test_token_zero_is_no_padding(said, num_accepted):
    target = target_that_says_zero()
    drafter = DRAFTERS["medusa"](heads_that_say(target, said), VOCAB, TreeShape(choices=CHOICES))
    results = generate(target, drafter, PROMPTS, max_new_tokens=40)
    for result in results:
        assert set(result.tokens) == {0}
        assert [record.num_accepted for record in result.records[:4]] == [num_accepted] * 4


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_token_zero_is_accepted_to_full_depth(kind):
    target = target_that_says_zero()
    head = lively_head(kind, target)
    head.logits = lambda outputs: torch.arange(VOCAB, 0, -1.0).expand(*outputs.shape[:-1], -1)
    drafter = DRAFTERS[kind](head, VOCAB, TreeShape(choices=CHOICES))
    results = generate(target, drafter, PROMPTS, max_new_tokens=40)
    for result in results:
        assert result.tokens == [0] * 40
        assert [record.num_accepted for record in result.records[:4]] == [3] * 4


@pytest.mark.parametrize("kind", DRAFTERS)
def test_last_tap_is_what_projection_reads(kind):
    target = small_target()
    head = lively_head(kind, target)
    taps = [3] if kind != "eagle3" else [1, 2, 3]
    assert list(head.taps) == taps
    output = target.prefill([[3, 1, 4, 1, 5]], head.taps)
    with torch.no_grad():
        said = target.model.lm_head(output.hidden[3][:, -1:])
    torch.testing.assert_close(said, output.logits)


BANNED = SamplingConfig(temperature=1.0, bad_words=[[token] for token in range(4)])


@pytest.mark.parametrize("children", ["top", "without_replacement", "with_replacement"])
@pytest.mark.parametrize(
    ("choices", "width"), [(CHOICES, 3), (None, 3), (None, 1)], ids=["static", "computed", "chain"]
)
def test_banned_draft_vocabulary_still_decodes(children, choices, width):
    target = small_target()
    head = lively_head("eagle3", target, draft_tokens=[0, 1, 2, 3])
    shape = TreeShape(depth=3, width=width, max_nodes=9, choices=choices, children=children)
    drafter = DRAFTERS["eagle3"](head, VOCAB, shape)
    greedy = SamplingConfig(bad_words=BANNED.bad_words)
    ours = generate(target, drafter, PROMPTS, greedy, max_new_tokens=12)
    plain = generate_baseline(target, PROMPTS, greedy, max_new_tokens=12)
    assert [result.tokens for result in ours] == [result.tokens for result in plain]
    for result in generate(target, drafter, PROMPTS, BANNED, max_new_tokens=12):
        assert len(result.tokens) == 12
        assert min(result.tokens) > 3


@pytest.mark.parametrize(
    "shape",
    [
        TreeShape(choices=CHOICES),
        TreeShape(choices=CHOICES, children="without_replacement"),
        TreeShape(choices=CHOICES, children="with_replacement"),
        TreeShape(depth=3, width=3, max_nodes=9),
    ],
)
def test_banned_vocabulary_reports_finite_numbers(shape):
    target = small_target()
    head = lively_head("eagle3", target, draft_tokens=[0, 1, 2, 3])
    drafter = DRAFTERS["eagle3"](head, VOCAB, shape)
    decoding = ScriptedDecoding(target, drafter, PROMPTS, [BANNED])
    decoding.step()
    draft = decoding.steps[0].draft
    reported = draft.confidence if draft.probs is None else draft.probs
    assert reported[draft.real_nodes()].isfinite().all()
