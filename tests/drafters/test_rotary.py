"""Heads turn keys and queries as their target does: its theta, its scaling, at any position."""

import pytest
from scripted import DRAFTERS, VOCAB, ScriptedDecoding, lively_head, slow_guesses, small_target
from slow_trees import check_drafts
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from specdec.drafters.feature_head import Backbone
from specdec.drafters.tree_growth import TreeShape
from specdec.targets.hf import HFTarget

TRAINED = 32  # positions before the scaling
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 8.0,
        "original_max_position_embeddings": TRAINED,
    },
}
# Longer and shorter than what was trained before the scaling.
PROMPTS = [[(7 * place) % VOCAB for place in range(70)], [3, 1, 4, 1, 5]]
SHAPE = TreeShape(depth=3, width=3, max_nodes=9)


def target_with(rope):
    """The small target, its weights the same whatever its rotary settings are."""
    plain = small_target().model
    config = LlamaConfig(**{**plain.config.to_dict(), "rope_parameters": dict(rope)})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    return HFTarget(model)


def decoded_steps(kind, head, target):
    decoding = ScriptedDecoding(target, DRAFTERS[kind](head, VOCAB, SHAPE), PROMPTS)
    for _ in range(3):
        decoding.step()
    return decoding.steps


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", ROPES)
def test_a_head_takes_over_the_targets_rotary_settings(kind, name):
    target = target_with(ROPES[name])
    head = lively_head(kind, target)
    steps = decoded_steps(kind, head, target)

    def check(rope):
        def guesses_behind(committed):
            return slow_guesses(kind, head, target, committed, rope=rope).logits

        check_drafts(steps, SHAPE, guesses_behind)

    check(ROPES[name])
    with pytest.raises(AssertionError):
        check(PLAIN)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", ["theta", "llama3", "yarn"])
def test_head_drafts_beyond_trained_length(kind, name):
    target = target_with(ROPES[name])
    head = lively_head(kind, target, backbone={"max_position_embeddings": 16})
    steps = decoded_steps(kind, head, target)
    assert all(step.draft.confidence.isfinite().all() for step in steps)
    check_drafts(
        steps,
        SHAPE,
        lambda committed: slow_guesses(kind, head, target, committed, rope=ROPES[name]).logits,
    )


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_head_keeps_own_rotary_settings(kind):
    target = target_with(ROPES["llama3"])
    head = lively_head(kind, target, backbone={"rope_parameters": ROPES["theta"]})
    check_drafts(
        decoded_steps(kind, head, target),
        SHAPE,
        lambda committed: slow_guesses(kind, head, target, committed, rope=ROPES["theta"]).logits,
    )


def test_full_attention_gives_rotary_settings():
    config = Gemma3TextConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 77.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
        },
    )
    backbone = Backbone().for_target(config)
    assert backbone.rope_parameters == {"rope_type": "linear", "rope_theta": 77.0, "factor": 8.0}


def test_partially_rotated_target_gets_fully_rotated_head():
    config = GPTNeoXConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={**ROPES["theta"], "partial_rotary_factor": 0.5},
    )
    backbone = Backbone().for_target(config)
    assert backbone.rope_parameters == ROPES["theta"]
    assert backbone.head_dim == 8


@pytest.mark.parametrize("field", ["rope_theta", "rope_scaling", "hiden_size"])
def test_unknown_backbone_field_is_refused(field):
    with pytest.raises(ValueError, match=rf"backbone.{field} does not exist.*rope_parameters"):
        lively_head("eagle", small_target(), backbone={field: 77.0})
