"""Trees of Medusa, EAGLE and EAGLE-3 heads equal those of the published algorithms, done plainly.

A head is run whole again for every node there, without a cache (`slow_heads.py`), and trees are
grown from sorted lists (`slow_trees.py`). Drafts are those of real decoding, after drafts before
them were taken and refused.
"""

from itertools import product

import pytest
import torch
from scripted import (
    DRAFTERS,
    PROMPTS,
    VOCAB,
    ScriptedDecoding,
    check_published,
    decoded,
    lively_head,
    slow_guesses,
    small_target,
)
from slow_heads import SlowEagle
from slow_trees import drafted_nodes, log_softmax, penalised
from tiny_heads import save_tiny_head
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from specdec import SamplingConfig
from specdec.drafters import feature_head
from specdec.drafters.feature_head import Backbone
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.targets.hf import HFTarget

CHOICES = [[0], [1], [4], [0, 0], [0, 2], [1, 0], [4, 1], [0, 0, 0], [0, 2, 1], [0, 2, 1, 0]]
DYNAMIC, STATIC = TreeShape(depth=4, width=5, max_nodes=18), TreeShape(choices=CHOICES)
SHAPES = {"dynamic": DYNAMIC, "static": STATIC, "chain": TreeShape(depth=3, width=1)}
KINDS = ["eagle", "eagle3", "mixture_of_attentions", "mtp", "peagle", "dflash"]
# A vocabulary of its own whose ids are not the target's.
DRAFT_TOKENS = [0, 1, 2, 4, 5, 7, 8, 11, 12, 16]
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
NORMS = {"norm_before_residual": True, "norm_before_fc": True}
FC = {"fc_norm": True}
POST_NORM = {"fc_norm": True, "norm_output": True}
SIZES = {
    "backbone": {"num_key_value_heads": 4, "head_dim": 6, "qk_norm": True},
    "cross": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20},
    "layers": {"num_key_value_heads": 1, "head_dim": 10},
}
# Name, kind, options of the head, and those that the plain head must know.
HEADS = [
    ("medusa", "medusa", {}, {}),
    ("medusa, two blocks, shared", "medusa", {"num_layers": 2, "own_vocab_head": False}, {}),
    ("medusa, draft vocabulary", "medusa", {"draft_tokens": DRAFT_TOKENS}, {}),
    ("eagle", "eagle", {}, {}),
    ("eagle, biased attention", "eagle", {"bias": False, "qkv_bias": True}, {}),
    ("eagle3", "eagle3", {}, {}),
    ("mtp", "mtp", {}, {}),
    ("mtp, a layer of Qwen3", "mtp", {"backbone": {"qk_norm": True}}, {}),
    ("dflash", "dflash", {}, {}),
    ("dflash, causal", "dflash", {"causal": True, "num_layers": 1}, {}),
    ("dflash, from the anchor", "dflash", {"sample_from_anchor": True, "own_ends": True}, {}),
    ("dflash, markov", "dflash", {"markov": "vanilla", "markov_rank": 4}, {}),
    ("dflash, gated markov", "dflash", {"markov": "gated", "confidence": True}, {}),
    ("mtp modules", "mtp", {"num_modules": 4}, {}),
    ("mixture_of_attentions", "mixture_of_attentions", {}, {}),
    *(
        (f"mixture_of_attentions, no {name}", "mixture_of_attentions", {name: False}, {name: False})
        for name in ("layer_self_attention", "cross_attention")
    ),
    (
        "mixture_of_attentions, target layers",
        "mixture_of_attentions",
        {"target_layers": 2},
        {"target_layers": 2},
    ),
    ("mixture_of_attentions, sizes", "mixture_of_attentions", SIZES, {}),
    ("peagle", "peagle", {}, {}),
    ("peagle, norms", "peagle", {**NORMS, "num_layers": 2, "mask_token_id": 3}, NORMS),
    ("peagle, draft vocabulary", "peagle", {"draft_tokens": DRAFT_TOKENS}, {}),
    ("peagle, the target's embedding", "peagle", {"own_embedding": False, "fc_norm": True}, FC),
    ("eagle3, draft vocabulary", "eagle3", {"draft_tokens": DRAFT_TOKENS}, {}),
    ("eagle3, norms", "eagle3", NORMS, NORMS),
    ("eagle3, three layers", "eagle3", {"num_layers": 3}, {}),
    ("eagle3, normed output", "eagle3", {"norm_output": True}, {"norm_output": True}),
    ("eagle3.1", "eagle3", POST_NORM, POST_NORM),
    ("eagle3.1, normed queries", "eagle3", {**POST_NORM, "backbone": {"qk_norm": True}}, POST_NORM),
    (
        "eagle3, own narrow embedding",
        "eagle3",
        {"own_embedding": True, "backbone": {**NARROW, "num_key_value_heads": 1}},
        {},
    ),
]
CASES = [
    pytest.param(kind, options, flags, SHAPES[shape], id=f"{name}-{shape}")
    for name, kind, options, flags in HEADS
    for shape in SHAPES
    if not (shape == "chain" and "," in name)
]
KINDS_AND_SHAPES = [
    pytest.param(kind, SHAPES[name], id=f"{kind}-{name}")
    for kind in ["medusa", *KINDS]
    for name in SHAPES
]


@pytest.mark.parametrize(("kind", "options", "flags", "shape"), CASES)
def test_every_draft_is_the_published_tree(kind, options, flags, shape):
    target = small_target()
    decoding = decoded(lively_head(kind, target, **options), target, shape, 5)
    check_published(decoding, **flags)
    assert 0 in decoding.num_accepted
    assert max(decoding.num_accepted) > 1


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_small_budgets_keep_first_or_best_nodes(kind, shape):
    def budget(step):
        return [0] * 4 if step == 3 else [(0, 2, 5, 18)[(step + row) % 4] for row in range(4)]

    target = small_target()
    decoding = decoded(lively_head(kind, target), target, shape, 5, budget=budget)
    check_published(decoding)
    assert max(decoding.num_accepted) > 1


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chosen_children_feel_penalties_but_no_temperature(kind, shape, temperature):
    target = small_target()
    reduced = {"draft_tokens": DRAFT_TOKENS} if kind in ("eagle3", "medusa", "peagle") else {}
    head = lively_head(kind, target, **reduced)
    sampling = [SamplingConfig(temperature=temperature, repetition_penalty=1.8)]
    check_published(decoded(head, target, shape, 5, sampling=sampling), penalty=1.8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 5])
def test_chunks_of_prompt_change_nothing(kind, window, monkeypatch):
    monkeypatch.setattr(feature_head, "CHUNK", 3)
    target = small_target()
    check_published(
        decoded(lively_head(kind, target), target, STATIC, window=window), window=window
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 5, 1000])
def test_window_shows_last_pairs_only(kind, shape, window):
    target = small_target()
    decoding = decoded(lively_head(kind, target), target, SHAPES[shape], window=window)
    check_published(decoding, window=window)
    if window < 1000:
        with pytest.raises(AssertionError):
            check_published(decoding)


def test_comparison_notices_shifted_features(monkeypatch):
    target = small_target()
    decoding = decoded(lively_head("eagle", target), target, SHAPES["chain"])
    fuse = SlowEagle.fuse
    monkeypatch.setattr(SlowEagle, "fuse", lambda self, hidden: fuse(self, hidden).roll(1, 0))
    with pytest.raises(AssertionError):
        check_published(decoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("sharpness", [0.0, 1e5])
def test_exact_ties_keep_trees_connected(kind, shape, sharpness):
    target = small_target()
    head = lively_head(kind, target)
    projection = head.lm_head if kind in ("eagle3", "peagle") else target.model.lm_head
    with torch.no_grad():
        projection.weight.mul_(sharpness)  # all tokens equally likely, or one of them certain
    size = len(CHOICES) if shape is STATIC else shape.max_nodes
    for step in decoded(head, target, shape).steps:
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

    name = "forward" if kind == "medusa" else "logits"
    run = getattr(head, name)
    setattr(head, name, lambda *inputs: hear(run(*inputs)))
    first, *_ = steps = decoded(head, target, shape).steps
    for step in steps:
        for row in range(len(PROMPTS)):
            known = {(): 1.0, **dict(drafted_nodes(step.draft, row))}
            assert all(0 <= known[path] <= known[path[:-1]] for path in known if path)
    # What the head said first in the first step is the distribution of the root's children.
    for row in range(len(PROMPTS)):
        for path, confidence in drafted_nodes(first.draft, row):
            if len(path) == 1:
                said = float(heard[0][row, 0, path[0]])
                assert confidence == pytest.approx(said, rel=1e-4)


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "peagle"])
@pytest.mark.parametrize("children", ["top", "without_replacement", "with_replacement"])
def test_wide_tree_holds_whole_draft_vocabulary(children, kind):
    shape = TreeShape(depth=2, width=50, max_nodes=40, children=children)
    target = small_target()
    head = lively_head(kind, target, draft_tokens=DRAFT_TOKENS)
    decoding = decoded(head, target, shape, 1)
    for row in range(len(PROMPTS)):
        paths = [path for path, _ in drafted_nodes(decoding.steps[0].draft, row)]
        assert {path[0] for path in paths} <= set(DRAFT_TOKENS)
        assert len(paths) == decoding.drafter.max_nodes == 40
    if children == "top" and kind != "medusa":  # a dynamic tree
        check_published(decoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("children", ["top", "without_replacement"])
@pytest.mark.parametrize(("width", "num_nodes"), [(1, 2), (3, 12)])
def test_tree_keeps_budget_and_depth(kind, children, width, num_nodes):
    target = small_target()
    for depth, max_nodes, expected in ((5, 3, 3), (2, 30, num_nodes)):
        shape = TreeShape(depth=depth, width=width, max_nodes=max_nodes, children=children)
        draft = decoded(lively_head(kind, target), target, shape, 1).steps[0].draft
        assert draft.lengths.tolist() == [expected] * len(PROMPTS)
        assert max(len(path) for path, _ in drafted_nodes(draft, 0)) <= depth


@pytest.mark.parametrize(("kind", "options"), [("medusa", {}), ("peagle", {"num_depths": 4})])
def test_tree_deeper_than_its_head_is_refused_or_cut(kind, options):
    target = small_target()
    head = lively_head(kind, target, **options)
    with pytest.raises(ValueError, match="the tree has 5 levels but the head drafts 4; choose a"):
        DRAFTERS[kind](head, target.vocab_size, TreeShape(choices=[[0] * n for n in range(1, 6)]))
    if kind == "peagle":
        for width in (1, 3):
            deep = TreeShape(depth=6, width=width)
            draft = decoded(head, target, deep, 1).steps[0].draft
            assert max(len(path) for path, _ in drafted_nodes(draft, 0)) == 4


def test_medusa_tree_is_best_for_acceptance(tmp_path):
    target = small_target()
    path = save_tiny_head(tmp_path, "medusa", target)
    drafter = MedusaDrafter.load(target, path, acceptance=[[0.5, 0.4], [0.9, 0.05]], max_nodes=4)
    assert sorted(drafter.shape.choices) == [(0,), (0, 0), (1,), (1, 0)]
    check_published(decoded(drafter.head, target, drafter.shape, 1))


@pytest.mark.parametrize("penalty", [None, 1.8])
def test_wide_medusa_tree_is_best_of_all_trees(tmp_path, penalty):
    target, size = small_target(), 12
    path = save_tiny_head(tmp_path, "medusa", target, num_heads=3)
    drafter = MedusaDrafter.load(target, path, width=size, max_nodes=size)
    assert (drafter.fixed_shape, drafter.max_nodes) == (None, size)
    sampling = [SamplingConfig(temperature=0.9, repetition_penalty=penalty or 1.0)]
    decoding = ScriptedDecoding(target, drafter, PROMPTS, sampling)
    for _ in range(4):
        decoding.step([0, 5, 9, size])
    for step, (row, budget) in product(decoding.steps, enumerate([0, 5, 9, size])):
        guesses = slow_guesses("medusa", drafter.head, target, step.committed[row])
        scores = {(): 0.0}  # of all paths of up to three tokens
        for depth in range(3):
            for path in [path for path in scores if len(path) == depth]:
                seen = {*step.committed[row], *path}
                logs = log_softmax(penalised(guesses.logits(path), seen, penalty or 1.0))
                scores |= {(*path, token): scores[path] + log for token, log in logs.items()}
        best = sorted(scores, key=lambda path: -scores[path])[1 : budget + 1]
        assert {path for path, _ in drafted_nodes(step.draft, row)} == {*best}
    assert max(decoding.num_accepted) > 1


TRAINED = 32  # positions before the scaling
SCALED = {"rope_theta": 50.0, "factor": 8.0, "original_max_position_embeddings": TRAINED}
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "yarn": {"rope_type": "yarn", **SCALED},
}
# A head of a target that scales its positions: the settings that it must turn with.
TURNS = [
    *((name, {}, name) for name in ROPES),
    *((name, {"max_position_embeddings": 16}, name) for name in ("theta", "llama3", "yarn")),
    ("llama3", {"rope_parameters": ROPES["theta"]}, "theta"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("targets", "own", "turns"), TURNS)
def test_head_turns_as_its_target_at_any_position(kind, targets, own, turns):
    plain = small_target().model
    config = LlamaConfig(**{**plain.config.to_dict(), "rope_parameters": dict(ROPES[targets])})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    target = HFTarget(model)
    # Longer and shorter than what was trained before the scaling.
    prompts = [[(7 * place) % VOCAB for place in range(70)], [3, 1, 4, 1, 5]]
    head = lively_head(kind, target, **({"backbone": own} if own else {}))
    decoding = decoded(head, target, TreeShape(depth=3, width=3, max_nodes=9), 3, prompts)
    check_published(decoding, rope=ROPES[turns])
    with pytest.raises(AssertionError):
        check_published(decoding, rope={"rope_type": "default", "rope_theta": 10000.0})


LINEAR = {"rope_type": "linear", "rope_theta": 77.0, "factor": 8.0}


@pytest.mark.parametrize(
    ("config_class", "rope", "expected"),
    [
        (Gemma3TextConfig, {"full_attention": LINEAR, "sliding_attention": ROPES["theta"]}, LINEAR),
        (GPTNeoXConfig, {**ROPES["theta"], "partial_rotary_factor": 0.5}, ROPES["theta"]),
    ],
    ids=["of full attention", "of whole heads"],
)
def test_other_families_give_their_rotary_settings(config_class, rope, expected):
    config = config_class(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    backbone = Backbone().for_target(config)
    assert backbone.rope_parameters == expected
    assert backbone.head_dim == getattr(config, "head_dim", 32 // 4)


@pytest.mark.parametrize("field", ["rope_theta", "rope_scaling", "hiden_size"])
def test_unknown_backbone_field_is_refused(field):
    with pytest.raises(ValueError, match=rf"backbone.{field} does not exist.*rope_parameters"):
        lively_head("eagle", small_target(), backbone={field: 77.0})


@pytest.mark.parametrize("kind", DRAFTERS)
def test_last_tap_is_what_projection_reads(kind):
    target = small_target()
    head = lively_head(kind, target)
    taps = {key: [1, 2, 3] for key in ("eagle3", "peagle", "dflash")}
    assert list(head.taps) == (taps | {"mixture_of_attentions": [-1, 3]}).get(kind, [3])
    output = target.prefill([[3, 1, 4, 1, 5]], head.taps)
    with torch.no_grad():
        said = target.model.lm_head(output.hidden[3][:, -1:])
    torch.testing.assert_close(said, output.logits)
