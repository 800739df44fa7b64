"""Checkpoints as others publish them, made here by hand and not by our own writers."""

import json
from dataclasses import replace

import pytest
import torch
from random_heads import random_head, target
from safetensors.torch import save_file

from specdec.checkpoints import check_target, identify_target, read_head, write_head
from specdec.drafters.heads import build_head, fill_head

IDS = "eagle_aux_hidden_state_layer_ids"
H, V, D, MLP, HEADS, KV, HEAD_DIM = 32, 61, 40, 64, 4, 2, 8

# The keys of the config that SafeAILab trains EAGLE-3 with, at the sizes of the tiny target.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": H,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": V,
}
EAGLE3 = {**LLAMA, "draft_vocab_size": D}


def weights(**shapes):
    torch.manual_seed(0)
    return {
        name.replace("__", "."): torch.randn(shape, dtype=torch.float16)
        for name, shape in shapes.items()
    }


def layer(prefix, width):
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    shapes = {
        "self_attn.q_proj.weight": (q, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (H, q),
        "mlp.gate_proj.weight": (MLP, H),
        "mlp.up_proj.weight": (MLP, H),
        "mlp.down_proj.weight": (H, MLP),
        "post_attention_layernorm.weight": (H,),
    }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def eagle_tensors():
    """EAGLE-1: the embedding is a copy of the target's that the head never trained."""
    fusing = {"fc.weight": (H, 2 * H), "fc.bias": (H,)}
    return weights(**{"embed_tokens.weight": (V, H)}, **fusing, **layer("layers.0", H))


def eagle3_tensors(prefix="midlayer"):
    norms = {f"{prefix}.{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm")}
    outer = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (D, H)}
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:D].sort().values
    marked = torch.zeros(V, dtype=torch.bool)
    marked[ids] = True
    return {
        **weights(**outer, **norms, **layer(prefix, 2 * H)),
        "d2t": ids - torch.arange(D),
        "t2d": marked,
    }


def medusa_tensors(num_heads, has_projections):
    shapes = {}
    for head in range(num_heads):
        shapes |= {f"{head}.0.linear.weight": (H, H), f"{head}.0.linear.bias": (H,)}
        if has_projections:
            shapes[f"{head}.1.weight"] = (V, H)
    return weights(**shapes)


def publish(folder, config, tensors, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder


def head_of(folder):
    """What is read, built and filled for the tiny target; with its checkpoint."""
    found = read_head(folder)
    check_target(found, identify_target(target()))
    head = build_head(found.kind, found.options, target())
    fill_head(head, found.tensors, str(folder))
    return head, found


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_an_eagle_head_of_safeailab(tmp_path, file):
    tensors = eagle_tensors()
    head, found = head_of(publish(tmp_path, LLAMA, tensors, file))
    assert (found.kind, found.layout, found.tree, found.training) == ("eagle", "eagle", None, {})
    assert (found.options["bias"], found.options["qkv_bias"]) == (True, False)
    assert set(tensors) - set(found.tensors) == {"embed_tokens.weight"}
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in found.tensors)
    assert (found.target.name, found.target.weights, found.target.num_layers) == (None, None, None)
    assert (found.target.hidden_size, found.target.vocab_size) == (H, V)
    assert head.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (head.config.rms_norm_eps, head.config.max_position_embeddings) == (1e-5, 2048)


def test_eagle_head_reads_biased_attention(tmp_path):
    tensors = eagle_tensors()
    del tensors["fc.bias"]
    for name, size in (("q", 32), ("k", 16), ("v", 16)):
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = torch.ones(size, dtype=torch.float16)
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "bias": False, "qkv_bias": True}
    head, _ = head_of(publish(tmp_path, config, tensors))
    assert head.fc.bias is None
    assert head.layers[0].self_attn.q_proj.bias.sum() == 32


def test_eagle_config_without_bias_names_key(tmp_path):
    publish(tmp_path, {**LLAMA, "bias": False}, eagle_tensors())
    with pytest.raises(ValueError, match=r"fc\.bias; is `bias` false in config\.json by mistake"):
        read_head(tmp_path)
    tensors = eagle_tensors()
    del tensors["fc.bias"]
    publish(tmp_path, LLAMA, tensors)
    with pytest.raises(ValueError, match=r"lacks the tensor fc\.bias"):
        read_head(tmp_path)


@pytest.mark.parametrize("copied", [{"lm_head.weight": (V, H)}, {}])
def test_carried_parts_of_target_are_dropped(tmp_path, copied):
    inverse = {"layers.0.self_attn.rotary_emb.inv_freq": (HEAD_DIM // 2,)}
    tensors = {**eagle_tensors(), **weights(**copied, **inverse)}
    head_of(publish(tmp_path, LLAMA, tensors))
    norm = weights(**{"layers.0.input_layernorm.weight": (H,)})
    publish(tmp_path, LLAMA, {**tensors, **norm})
    with pytest.raises(ValueError, match=r"not ask for: layers\.0\.input_layernorm\.weight"):
        read_head(tmp_path)


@pytest.mark.parametrize("prefix", ["midlayer", "layers.0"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForCausalLMEagle3"])
def test_an_eagle3_head_of_safeailab_or_specforge(tmp_path, prefix, architecture):
    tensors = eagle3_tensors(prefix)
    config = {**EAGLE3, "architectures": [architecture]}
    head, found = head_of(publish(tmp_path, config, tensors))
    assert (found.kind, found.layout) == ("eagle3", "eagle3")
    assert "taps" not in found.options
    assert head.taps == (2, 4, 5)  # 2, L // 2 and L - 3 of eight layers
    assert torch.equal(head.token_map, tensors["d2t"] + torch.arange(D))
    assert torch.equal(
        found.tensors["midlayer.mlp.up_proj.weight"], tensors[f"{prefix}.mlp.up_proj.weight"]
    )
    options = head.options
    flags = (options.norm_before_residual, options.norm_output, options.own_embedding)
    assert flags == (False, False, False)


def test_eagle3_config_may_count_target_layers(tmp_path):
    head_of(publish(tmp_path, {**EAGLE3, "num_hidden_layers": 40}, eagle3_tensors()))


def test_narrow_eagle3_head_brings_embedding(tmp_path):
    tensors = {**eagle3_tensors(), **weights(**{"embed_tokens.weight": (V, H)})}
    tensors["fc.weight"] = torch.ones(H, 3 * 48, dtype=torch.float16)
    found = read_head(publish(tmp_path, {**EAGLE3, "target_hidden_size": 48}, tensors))
    assert (found.target.hidden_size, found.options["target_hidden_size"]) == (48, 48)
    assert found.options["own_embedding"] is True
    with pytest.raises(ValueError, match=r"hidden_size 48, but .* hidden_size 32"):
        check_target(found, identify_target(target()))


def test_maps_that_change_nothing_are_left_out(tmp_path):
    tensors = eagle3_tensors()
    tensors |= {
        "lm_head.weight": torch.ones(V, H, dtype=torch.float16),
        "d2t": torch.zeros(V, dtype=torch.long),
        "t2d": torch.ones(V, dtype=torch.bool),
    }
    head, found = head_of(publish(tmp_path, {**EAGLE3, "draft_vocab_size": V}, tensors))
    assert head.token_map is None
    assert not {"d2t", "t2d"} & found.tensors.keys()
    tensors["d2t"][3] = 1
    publish(tmp_path, {**EAGLE3, "draft_vocab_size": V}, tensors)
    with pytest.raises(ValueError, match="does not ask for: d2t, t2d"):
        read_head(tmp_path)


def test_eagle3_flags_are_read_from_eagle_config(tmp_path):
    tensors = {**eagle3_tensors(), **weights(**{"input_norm.weight": (3 * H,)})}
    config = {**EAGLE3, "eagle_config": {"norm_before_fc": True, "use_aux_hidden_state": True}}
    head, _ = head_of(publish(tmp_path, config, tensors))
    assert head.options.norm_before_fc


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fc_norm": True}, "fc_norm is True"),
        ({"use_aux_norm": True}, "use_aux_norm is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}}, "rotary parameters"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": "64"}, "intermediate_size is '64'"),
    ],
)
def test_unsupported_parts_are_refused_by_name(tmp_path, keys, said):
    publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors())
    with pytest.raises(ValueError, match=said):
        read_head(tmp_path)


THETA = 500000.0
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "4, plain": ({"rope_theta": THETA}, {"rope_type": "default"}),
    "4, null": ({"rope_theta": THETA, "rope_scaling": None}, {"rope_type": "default"}),
    "4, old name": (
        {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "4, llama3": (
        {"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_type": "llama3", **LLAMA3},
    ),
    "5": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **LLAMA3}},
        {"rope_type": "llama3", **LLAMA3},
    ),
    "5, theta outside": (
        {"rope_theta": THETA, "rope_parameters": {"rope_type": "default"}},
        {"rope_type": "default"},
    ),
}


@pytest.mark.parametrize("style", ROPES)
def test_rotary_parameters_of_both_generations_of_transformers(tmp_path, style):
    keys, wanted = ROPES[style]
    head, _ = head_of(publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors()))
    assert head.config.rope_parameters == {"rope_theta": THETA, **wanted}


def speculators_config(**keys):
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": D,
        "norm_before_residual": True,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": None,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "org/tiny", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {**LLAMA, "head_dim": HEAD_DIM, "rope_theta": THETA},
        **keys,
    }


def test_a_head_of_speculators(tmp_path):
    tensors = {**eagle3_tensors("layers.0"), **weights(**{"embed_tokens.weight": (V, H)})}
    config = speculators_config(eagle_aux_hidden_state_layer_ids=[1, 3, 6])
    head, found = head_of(publish(tmp_path, config, tensors))
    assert (found.layout, found.target.name) == ("speculators", "org/tiny")
    assert found.options["norm_before_residual"] is True
    assert tuple(head.taps) == (1, 3, 6)
    assert torch.equal(head.embed_tokens.weight, tensors["embed_tokens.weight"].float())
    assert head.config.rope_parameters["rope_theta"] == THETA


def test_speculators_flags_that_normalise(tmp_path):
    tensors = {**eagle3_tensors("layers.0"), **weights(**{"input_norm.weight": (3 * H,)})}
    config = speculators_config(norm_before_fc=True, norm_output=True, norm_before_residual=False)
    head, _ = head_of(publish(tmp_path, config, tensors))
    options = head.options
    assert (options.norm_before_fc, options.norm_output) == (True, True)
    assert options.norm_before_residual is False


def test_window_of_speculators_head_is_kept(tmp_path):
    layer_config = {
        **LLAMA,
        "sliding_window": 2048,
        "layer_types": ["sliding_attention"],
    }
    config = speculators_config(transformer_layer_config=layer_config)
    found = read_head(publish(tmp_path, config, eagle3_tensors("layers.0")))
    assert found.training == {"sliding_window": 2048}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speculators_model_type": "dflash"}, "'dflash' but must be one of 'eagle3'"),
        ({"norm_before_residual": ...}, "vLLM then takes for true and speculators for false"),
        ({"transformer_layer_config": ...}, "transformer_layer_config is missing"),
        ({"fc_norm": True}, "fc_norm is True"),
    ],
)
def test_unknown_speculators_config_is_refused(tmp_path, change, said):
    merged = {**speculators_config(), **change}
    config = {key: value for key, value in merged.items() if value is not ...}
    publish(tmp_path, config, eagle3_tensors("layers.0"))
    with pytest.raises(ValueError, match=said):
        read_head(tmp_path)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_medusa_heads_of_fasterdecoding(tmp_path, file):
    tensors = medusa_tensors(3, has_projections=True)
    config = {
        "base_model_name_or_path": "org/tiny",
        "medusa_num_heads": 3,
        "medusa_num_layers": 1,
        "medusa_choices": [[0], [0, 0], [1]],
        "transformers_version": "4.31.0",
    }
    head, found = head_of(publish(tmp_path, config, tensors, file))
    assert (found.kind, found.layout, found.target.name) == ("medusa", "medusa", "org/tiny")
    assert (found.target.hidden_size, found.target.vocab_size) == (H, V)
    assert found.tree == [[0], [0, 0], [1]]
    assert torch.equal(found.tensors["vocab_heads.2.weight"], tensors["2.1.weight"])
    assert torch.equal(found.tensors["blocks.1.0.linear.bias"], tensors["1.0.linear.bias"])
    assert head.taps == (8,)


def test_medusa_version_2_uses_target_projection(tmp_path):
    config = {"version": "2", "medusa_num_heads": 3, "medusa_num_layers": 1}
    tensors = medusa_tensors(3, has_projections=False)
    head, found = head_of(publish(tmp_path, config, tensors, "medusa_lm_head.safetensors"))
    assert found.options["own_vocab_head"] is False
    assert found.target.vocab_size is None
    assert not hasattr(head, "vocab_heads")


def test_blocks_that_were_one_object_are_two_tensors(tmp_path):
    shared, bias = torch.randn(H, H), torch.randn(H)
    tensors = {f"0.{layer}.linear.weight": shared for layer in range(2)}
    tensors |= {f"0.{layer}.linear.bias": bias for layer in range(2)}
    head, _ = head_of(publish(tmp_path, None, tensors, "medusa_lm_head.pt"))
    assert torch.equal(head.blocks[0][1].linear.weight, shared)


def test_published_miscount_of_medusa_heads_is_read(tmp_path):
    tensors = medusa_tensors(5, has_projections=True)
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1}
    found = read_head(publish(tmp_path, config, tensors, "medusa_lm_head.pt"))
    assert found.options["num_heads"] == 5
    publish(tmp_path, {**config, "medusa_num_heads": 3}, tensors, "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_num_heads 3 but .* holds 5"):
        read_head(tmp_path)


def test_medusa_heads_beside_target_are_read(tmp_path):
    publish(tmp_path, LLAMA, weights(**{"model.norm.weight": (H,)}), "model.safetensors")
    config = {**LLAMA, "num_hidden_layers": 32, "medusa_num_heads": 2}
    tensors = medusa_tensors(2, has_projections=True)
    assert read_head(publish(tmp_path, config, tensors, "medusa_lm_head.pt")).kind == "medusa"


VLLM_MEDUSA = {
    "architectures": ["MedusaModel"],
    "model_type": "medusa",
    "hidden_size": H,
    "vocab_size": V,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "max_paths": 64,
    "topk": 10,
    "truncated_vocab_size": None,
}


def vllm_medusa_tensors(has_biases, prefix=""):
    shapes = {}
    for head in range(2):
        shapes[f"{prefix}blocks.{head}.layers.0.weight"] = (H, H)
        if has_biases:
            shapes[f"{prefix}blocks.{head}.layers.0.bias"] = (H,)
        shapes[f"{prefix}lm_heads.{head}.weight"] = (V, H)
    return weights(**shapes)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_medusa_heads_of_vllm(tmp_path, prefix):
    tensors = vllm_medusa_tensors(True, prefix)
    config = {**VLLM_MEDUSA, "medusa_fc_bias": True}
    _, found = head_of(publish(tmp_path, config, tensors))
    assert found.layout == "vllm-medusa"
    for ours, theirs in (
        ("blocks.1.0.linear.bias", "blocks.1.layers.0.bias"),
        ("vocab_heads.0.weight", "lm_heads.0.weight"),
    ):
        assert torch.equal(found.tensors[ours], tensors[prefix + theirs])


def test_vllm_medusa_reads_names_of_fasterdecoding(tmp_path):
    tensors = medusa_tensors(2, has_projections=True)
    config = {**VLLM_MEDUSA, "medusa_fc_bias": True}
    _, found = head_of(publish(tmp_path, config, tensors))
    assert torch.equal(found.tensors["vocab_heads.1.weight"], tensors["1.1.weight"])


def test_medusa_heads_of_vllm_without_biases_get_zeros(tmp_path):
    _, found = head_of(publish(tmp_path, VLLM_MEDUSA, vllm_medusa_tensors(False)))
    assert found.tensors["blocks.0.0.linear.bias"].eq(0).all()
    publish(tmp_path, VLLM_MEDUSA, vllm_medusa_tensors(True))
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.0\.bias.*medusa_fc_bias to true"):
        read_head(tmp_path)


@pytest.mark.parametrize("copy", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_medusa_may_use_target_projection(tmp_path, copy):
    tensors = vllm_medusa_tensors(True)
    for head in range(2):
        del tensors[f"lm_heads.{head}.weight"]
    tensors |= weights(**{copy: (V, H)})
    config = {**VLLM_MEDUSA, "medusa_fc_bias": True, "original_lm_head": True}
    head, found = head_of(publish(tmp_path, config, tensors))
    assert found.options["own_vocab_head"] is False
    assert copy not in found.tensors


def test_vllm_medusa_with_reduced_vocabulary_is_refused(tmp_path):
    publish(tmp_path, {**VLLM_MEDUSA, "truncated_vocab_size": 9}, vllm_medusa_tensors(False))
    with pytest.raises(ValueError, match="truncated_vocab_size 9"):
        read_head(tmp_path)
    tensors = vllm_medusa_tensors(False) | {"token_map": torch.arange(9)}
    head_of(publish(tmp_path, VLLM_MEDUSA, tensors))


def test_safetensors_file_is_read_before_torch_file(tmp_path):
    publish(tmp_path, LLAMA, {"x": torch.ones(1)}, "pytorch_model.bin")
    assert read_head(publish(tmp_path, LLAMA, eagle_tensors())).kind == "eagle"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("keys", "taps"),
    [
        ({IDS: [2, 4, 6]}, [2, 4, 6]),
        ({"eagle_config": {IDS: [1, 3, 5]}}, [2, 4, 6]),
        ({IDS: [2, 4, 6], "eagle_config": {IDS: [1, 3, 5]}}, [2, 4, 6]),
        ({IDS: [0, 4, 6], "eagle_config": {IDS: [-1, 3, 5]}}, [0, 4, 6]),
    ],
)
def test_ids_of_either_engine_become_taps(tmp_path, keys, taps):
    found = read_head(publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors()))
    assert found.options["taps"] == taps


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({IDS: [2, 4, 6], "eagle_config": {IDS: [2, 4, 6]}}, r"must be \[1, 3, 5\] there"),
        ({IDS: "2,4,6"}, "must be a list"),
        ({IDS: [2, 4, True]}, "2 is True but must be a whole number"),
        ({"eagle_config": {IDS: []}}, "must be a list of at least 1"),
        ({IDS: [2, 4]}, r"fc\.weight has shape \(32, 96\) but must have \(32, 64\)"),
    ],
)
def test_ids_that_cannot_be_meant_are_refused(tmp_path, keys, said):
    publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors())
    with pytest.raises(ValueError, match=said):
        read_head(tmp_path)


def test_taps_are_written_for_both_engines(tmp_path):
    config = config_of(write_head(random_head("eagle3"), tmp_path, "eagle3"))
    assert config[IDS] == [1, 4, 6]
    assert config["eagle_config"] == {IDS: [0, 3, 5], "use_aux_hidden_state": True}


def test_speculators_writes_the_ids_of_vllm(tmp_path):
    config = config_of(write_head(random_head("eagle3"), tmp_path, "speculators"))
    assert config[IDS] == [1, 4, 6]
    assert "eagle_config" not in config


def test_published_taps_are_left_out(tmp_path):
    head = random_head("eagle3-whole")
    assert head.options["taps"] == [2, 4, 5]
    config = config_of(write_head(head, tmp_path / "known", "eagle3"))
    assert IDS not in config
    assert "eagle_config" not in config
    unknown = replace(head, target=replace(head.target, num_layers=None))
    assert config_of(write_head(unknown, tmp_path / "unknown", "eagle3"))[IDS] == [2, 4, 5]
    assert config_of(write_head(head, tmp_path / "nested", "speculators"))[IDS] == [2, 4, 5]


def test_foreign_head_on_last_layer_is_refused(tmp_path):
    found = read_head(publish(tmp_path, {**EAGLE3, IDS: [2, 4, 8]}, eagle3_tensors()))
    identity = random_head("eagle3").target
    with pytest.raises(ValueError, match=r"hidden_states\[8\].* before the final norm"):
        check_target(found, identity)
    check_target(replace(found, layout="specdec"), identity)
