"""Which target a head belongs to: facts that survive loading, and the refusal of another."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint, save_tokenizer
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import load_target
from specdec.checkpoints import HeadCheckpoint, check_target, identify_target
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, differences
from specdec.common.files import Journal
from specdec.targets.hf import HFTarget


def head_for(identity, **options):
    return HeadCheckpoint("eagle3", options, {}, target=identity)


@pytest.fixture(scope="module")
def known():
    return identify_target(tiny_target())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_target_keeps_identity_in_every_dtype(tmp_path, stored):
    model = tiny_llama().to(stored)
    folder = save_checkpoint(tmp_path / "secret" / "model", model)
    whole = identify_target(load_target(str(folder)))
    assert whole.name == "model"
    assert whole.weights == identify_target(HFTarget(model)).weights is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = identify_target(load_target(str(folder), dtype=dtype))
        assert loaded.weights == whole.weights
        assert not list(differences(loaded, whole, is_resume=True))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/model", "org/model"),
        ("/home/me/.cache/hub/models--org--model/snapshots/0a1b", "org/model"),
        ("~/models/mine", "mine"),
        ("some/where/mine/", "mine"),
        ("", None),
    ],
)
def test_a_hub_id_is_kept_whole(path, name):
    target = tiny_target(vocab_size=83, num_layers=3)
    target.model.config._name_or_path = path
    identity = identify_target(target)
    assert identity.name == name
    assert (identity.hidden_size, identity.vocab_size, identity.num_layers) == (32, 83, 3)


def test_quantized_target_has_no_weight_hash():
    target = tiny_target()
    target.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert identify_target(target).weights is None
    target, packed = tiny_target(), torch.zeros(64, 32, dtype=torch.uint8)
    target.model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(packed, False)
    identity = identify_target(target)
    assert identity.weights is None
    assert "model.layers.1.mlp.up_proj.weight (uint8)" in identity.magnitudes


def set_config(**values):
    return lambda target: target.config.update(values)


def scale(*names, by):
    def change(target):
        for name, weight in target.model.named_parameters():
            if not names or name in names:
                weight.data.mul_(by)

    return change


def perturb(target):
    target.model = perturbed(target.model, 0.01)


ROPE = {"rope_type": "default", "rope_theta": 500000.0}
NORM, LAYER = "model.norm.weight", "model.layers.1"
# A change, the fact that a head's refusal names, and that of a run that is to go on.
OTHERS = {
    "rope": (set_config(rope_parameters=ROPE), "rope_theta 10000.0, not 500000.0", "rope_theta"),
    "activation": (set_config(hidden_act="gelu"), "hidden_act silu, not gelu", "hidden_act"),
    "window": (set_config(sliding_window=64), "sliding_window None, not 64", "sliding_window"),
    "stop ids": (lambda t: setattr(t, "eos_token_ids", (7, 5)), r"\[\], not \[5, 7\]", "eos_token"),
    "norm": (scale(f"{LAYER}.input_layernorm.weight", by=1.05), "input_layernorm", "input_layer"),
    "scale": (scale(by=1.05), "magnitude of model.embed_tokens.weight", "magnitude"),
    "sign of a norm": (scale(NORM, by=-1), f"magnitude of {NORM}", "magnitude"),
    "attention": (scale(f"{LAYER}.self_attn.v_proj.weight", by=-1), "set of weights", "weights"),
    "projection": (scale(f"{LAYER}.mlp.down_proj.weight", by=-1), "set of weights", "weights"),
    "model": (perturb, r"whose set of weights differs .* force=true", "weights"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_target_is_refused_unless_forced(name, tmp_path):
    target = tiny_target()
    target.config.sliding_window = None
    known = identify_target(target)
    checks = {TARGET: partial(check_resumed, tmp_path)}
    with Journal(tmp_path / "j", {TARGET: as_json(known)}, checks) as journal:
        journal.append({"a": 1})
    check_target(head_for(known), known)
    change, said, fact = OTHERS[name]
    change(target)
    other = identify_target(target)
    assert (other.weights == known.weights) is (fact != "weights")
    with pytest.raises(ValueError, match=said):
        check_target(head_for(known), other)
    check_target(head_for(known), other, force=True)
    with pytest.raises(ValueError, match=f"another target: .*{fact}"):
        Journal(tmp_path / "j", {TARGET: as_json(other)}, checks)


def test_facts_of_one_version_are_not_compared(known):
    newer = replace(known, facts={**known.facts, "new_default": 3})
    target = tiny_target()
    target.config.update({"id2label": {0: "x"}, "use_cache": False, "transformers_version": "9"})
    for other in (newer, identify_target(target)):
        check_target(head_for(known), other)
        check_target(head_for(other), known)


def test_quantized_version_keeps_heads_and_resumes_nothing(known):
    target = tiny_target()
    target.model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    scale(NORM, by=1.1)(target)  # as methods do that move scales into norms
    other = identify_target(target)
    check_target(head_for(known), other)
    with pytest.raises(ValueError, match="another target: quantization was None"):
        check_resumed(Path("run"), as_json(known), as_json(other))


def test_older_identity_is_compared_with_warning(known):
    old = replace(known, facts=None, magnitudes=None)
    with pytest.warns(UserWarning, match=r"older versions wrote it.* specdec export"):
        check_target(head_for(old), known)
    with pytest.warns(UserWarning, match="older"):
        check_resumed(Path("run"), None, as_json(known))
    with pytest.warns(UserWarning, match="older"), pytest.raises(ValueError, match="weights"):
        check_target(head_for(old), replace(known, weights="0"))


def test_another_tokenizer_is_refused_unless_forced(tmp_path):
    known = identify_target(load_target(str(save_checkpoint(tmp_path / "one"))))
    folder = save_checkpoint(tmp_path / "two")
    save_tokenizer(folder, first=8)
    other = identify_target(load_target(str(folder)))
    with pytest.raises(
        ValueError, match="'one', whose vocabulary differs from that of target 'two'"
    ):
        check_target(head_for(known), other)
    check_target(head_for(known), other, force=True)


@pytest.mark.parametrize("fact", ["hidden_size", "vocab_size", "num_layers"])
@pytest.mark.parametrize("force", [False, True])
def test_another_size_is_refused_even_if_forced(known, fact, force):
    other = replace(known, **{fact: 7})
    with pytest.raises(ValueError, match=f"{fact} {getattr(known, fact)}, but .* {fact} 7"):
        check_target(head_for(known), other, force=force)


def test_taps_behind_the_last_layer_are_refused(known):
    check_target(head_for(None, taps=[0, 1, 2]), known)
    with pytest.raises(ValueError, match=r"hidden_states\[3\] .* only 2 layers"):
        check_target(head_for(None, taps=[1, 2, 3]), known)


@pytest.mark.parametrize("fact", ["name", "vocab_size", "num_layers", "weights", "tokenizer"])
def test_what_is_not_known_is_not_compared(known, fact):
    check_target(head_for(replace(known, **{fact: None})), known)
    check_target(head_for(known), replace(known, **{fact: None}))
    check_target(head_for(None), known)
