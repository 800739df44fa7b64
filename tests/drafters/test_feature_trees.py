"""Trees of Medusa, EAGLE and EAGLE-3 heads equal those of the published algorithms, done plainly.

A head is run whole again for every node there, without a cache (`slow_heads.py`), and trees are
grown from sorted lists (`slow_trees.py`). Drafts are those of real decoding, after drafts before
them were taken and refused.
"""

import pytest
import torch
from scripted import (
    DRAFTERS,
    PROMPTS,
    VOCAB,
    ScriptedDecoding,
    lively_head,
    slow_guesses,
    small_target,
    true_features,
)
from slow_heads import Continuation, SlowEagle
from slow_trees import check_drafts, drafted_nodes, penalised

from specdec import SamplingConfig
from specdec.drafters import feature_head as feature_drafter
from specdec.drafters.tree_growth import TreeShape

DYNAMIC = TreeShape(depth=4, width=5, max_nodes=18)
CHOICES = [[0], [1], [4], [0, 0], [0, 2], [1, 0], [4, 1], [0, 0, 0], [0, 2, 1], [0, 2, 1, 0]]
STATIC = TreeShape(choices=CHOICES)
CHAIN = TreeShape(depth=3, width=1)
# A vocabulary of its own whose ids are not the target's.
DRAFT_TOKENS = [0, 1, 2, 4, 5, 7, 8, 11, 12, 16]
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}

HEADS = {
    "medusa": ("medusa", {}, {}),
    "medusa, two blocks, the target's projection": (
        "medusa",
        {"num_layers": 2, "own_vocab_head": False},
        {},
    ),
    "eagle": ("eagle", {}, {}),
    "eagle, no bias, biased attention": ("eagle", {"bias": False, "qkv_bias": True}, {}),
    "eagle3": ("eagle3", {}, {}),
    "eagle3, draft vocabulary": ("eagle3", {"draft_tokens": DRAFT_TOKENS}, {}),
    "eagle3, norms": (
        "eagle3",
        {"norm_before_residual": True, "norm_before_fc": True},
        {"norm_before_residual": True, "norm_before_fc": True},
    ),
    "eagle3, normed output": ("eagle3", {"norm_output": True}, {"norm_output": True}),
    "eagle3, own narrow embedding": (
        "eagle3",
        {"own_embedding": True, "backbone": {**NARROW, "num_key_value_heads": 1}},
        {},
    ),
}
NUM_STEPS = 5
SHAPES = {"dynamic": DYNAMIC, "static": STATIC, "chain": CHAIN}
CASES = [
    pytest.param(*HEADS[name], SHAPES[shape], id=f"{name}-{shape}")
    for name in HEADS
    for shape in SHAPES
    if not (shape == "dynamic" and name.startswith("medusa"))
    if not (shape == "chain" and "," in name)
]
KINDS_AND_SHAPES = [
    pytest.param("medusa", STATIC, id="medusa-static"),
    *(
        pytest.param(kind, shape, id=f"{kind}-{name}")
        for kind in ("eagle", "eagle3")
        for name, shape in SHAPES.items()
    ),
]


def decoded(kind, head, target, shape, sampling=None, budget=None):
    """Some steps of decoding; every draft is noted. `budget` is called with the step's number."""
    drafter = DRAFTERS[kind](head, target.vocab_size, shape)
    decoding = ScriptedDecoding(target, drafter, PROMPTS, sampling)
    for step in range(NUM_STEPS):
        decoding.step(budget and budget(step))
    return decoding


@pytest.mark.parametrize(("kind", "options", "flags", "shape"), CASES)
def test_every_draft_is_the_published_tree(kind, options, flags, shape):
    target = small_target()
    head = lively_head(kind, target, **options)
    decoding = decoded(kind, head, target, shape)
    check_drafts(
        decoding.steps,
        shape,
        lambda committed: slow_guesses(kind, head, target, committed, **flags).logits,
    )
    assert 0 in decoding.num_accepted
    assert max(decoding.num_accepted) > 1


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_small_budgets_keep_first_or_best_nodes(kind, shape):
    target = small_target()
    head = lively_head(kind, target)

    def budget(step):
        return [0] * 4 if step == 3 else [(0, 2, 5, 18)[(step + row) % 4] for row in range(4)]

    decoding = decoded(kind, head, target, shape, budget=budget)
    check_drafts(
        decoding.steps, shape, lambda committed: slow_guesses(kind, head, target, committed).logits
    )
    assert max(decoding.num_accepted) > 1


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chosen_children_feel_penalties_but_no_temperature(kind, shape, temperature):
    target = small_target()
    head = lively_head(kind, target, **({"draft_tokens": DRAFT_TOKENS} if kind == "eagle3" else {}))
    sampling = [SamplingConfig(temperature=temperature, repetition_penalty=1.8)]
    decoding = decoded(kind, head, target, shape, sampling)

    def guesses_behind(committed):
        slow = slow_guesses(kind, head, target, committed)
        return lambda path: penalised(slow.logits(path), {*committed, *path}, 1.8)

    check_drafts(decoding.steps, shape, guesses_behind)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_chunks_of_prompt_change_nothing(kind, monkeypatch):
    target = small_target()
    head = lively_head(kind, target)
    whole = decoded(kind, head, target, DYNAMIC)
    monkeypatch.setattr(feature_drafter, "CHUNK", 3)
    chunked = decoded(kind, head, target, DYNAMIC)
    assert len(whole.steps) == len(chunked.steps)
    for ours, theirs in zip(chunked.steps, whole.steps, strict=True):
        assert ours.committed == theirs.committed
        for row in range(len(ours.committed)):
            drafted, expected = drafted_nodes(ours.draft, row), drafted_nodes(theirs.draft, row)
            assert [path for path, _ in drafted] == [path for path, _ in expected]
            for (_, here), (_, there) in zip(drafted, expected, strict=True):
                assert here == pytest.approx(there, rel=1e-4)


def test_comparison_notices_shifted_features():
    target = small_target()
    head = lively_head("eagle", target)
    decoding = decoded("eagle", head, target, CHAIN)

    def off_by_one(committed):
        slow = SlowEagle(head, target.model)
        features = slow.fuse(true_features(target, committed, [3]))
        return Continuation(slow, committed, features.roll(1, 0)).logits

    with pytest.raises(AssertionError):
        check_drafts(decoding.steps, CHAIN, off_by_one)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("shape", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("sharpness", [0.0, 1e5])
def test_exact_ties_keep_trees_connected(kind, shape, sharpness):
    target = small_target()
    head = lively_head(kind, target)
    projection = target.model.lm_head if kind == "eagle" else head.lm_head
    with torch.no_grad():
        projection.weight.mul_(sharpness)  # all tokens equally likely, or one of them certain
    decoding = decoded(kind, head, target, shape)
    size = len(CHOICES) if shape is STATIC else shape.max_nodes
    for step in decoding.steps:
        for row in range(len(PROMPTS)):
            paths, confidences = zip(*drafted_nodes(step.draft, row), strict=True)
            assert len(set(paths)) == len(paths) == size
            assert {path[:-1] for path in paths} <= {(), *paths}
            if not sharpness:
                likely = [VOCAB ** -len(path) for path in paths]
                assert confidences == pytest.approx(likely, rel=1e-4)
            elif shape is DYNAMIC:
                certain = [path for path, here in zip(paths, confidences, strict=True) if here == 1]
                assert [len(path) for path in certain] == [1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_is_product_along_path(kind, shape, dtype):
    target = small_target()
    head = lively_head(kind, target).to(dtype)
    target.model.to(dtype)
    heard = []

    def hear(logits):
        heard.append(logits.float().softmax(-1))
        return logits

    if kind == "medusa":
        head.forward = lambda *inputs, run=head.forward: hear(run(*inputs))
    else:
        head.logits = lambda outputs, run=head.logits: hear(run(outputs))
    decoding = decoded(kind, head, target, shape)
    for step in decoding.steps:
        for row in range(len(PROMPTS)):
            known = {(): 1.0, **dict(drafted_nodes(step.draft, row))}
            for path, confidence in drafted_nodes(step.draft, row):
                assert 0 <= confidence <= known[path[:-1]]
    # What the head said first in the first step is the law of the root's children.
    first = heard[0][:, 0]
    for row in range(len(PROMPTS)):
        for path, confidence in drafted_nodes(decoding.steps[0].draft, row):
            if len(path) == 1:
                assert confidence == pytest.approx(float(first[row, path[0]]), rel=1e-4)
