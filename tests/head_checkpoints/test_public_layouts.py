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
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
MEDUSA = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
NESTED, THETA = "transformer_layer_config", 500000.0

# The keys of the config that SafeAILab trains EAGLE-3 with, at the sizes of the tiny target.
LLAMA = json.loads(
    """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.28.1",
    "use_cache": true, "vocab_size": 61}"""
)
EAGLE3 = {**LLAMA, "draft_vocab_size": D}
SPECULATORS = json.loads(
    """{"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
    "speculators_version": "0.3.0", "draft_vocab_size": 40, "norm_before_residual": true,
    "target_hidden_size": null, "eagle_aux_hidden_state_layer_ids": null, "speculators_config": {
    "algorithm": "eagle3", "default_proposal_method": "greedy",
    "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
    "verifier": {"name_or_path": "org/tiny", "architectures": ["LlamaForCausalLM"]}}}"""
)
SPECULATORS[NESTED] = {**LLAMA, "head_dim": HEAD_DIM, "rope_theta": THETA}
WINDOW = {**LLAMA, "sliding_window": 2048, "layer_types": ["sliding_attention"]}
MIXED = {**WINDOW, "num_hidden_layers": 2}
MIXED["layer_types"] = ["sliding_attention", "full_attention"]
MEDUSA_3 = json.loads(
    """{"base_model_name_or_path": "org/tiny", "medusa_num_heads": 3, "medusa_num_layers": 1,
    "medusa_choices": [[0], [0, 0], [1]], "transformers_version": "4.31.0"}"""
)
VLLM = json.loads(
    """{"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": 32,
    "vocab_size": 61, "num_heads": 2, "num_hidden_layers": 1, "max_paths": 64, "topk": 10,
    "truncated_vocab_size": null}"""
)
BIASED = {**VLLM, "medusa_fc_bias": True}
# DFlash and DSpark, with the keys that each project saves.
LAYERS = json.loads(
    """{"attention_bias": false, "attention_dropout": 0.0, "head_dim": 8, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 64, "layer_types": ["full_attention"],
    "max_position_embeddings": 512, "model_type": "qwen3", "num_attention_heads": 4,
    "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
    "use_sliding_window": false, "vocab_size": 61}"""
)
Z_LAB = {
    **{**LAYERS, "architectures": ["DFlashDraftModel"], "rope_scaling": None},
    **{"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "num_target_layers": 8},
    **{"block_size": 5, "dflash_config": {"mask_token_id": 60, "target_layer_ids": [1, 3, 5]}},
}
MUSE = {name: value for name, value in LAYERS.items() if name != "vocab_size"} | {
    **{"model_type": "muse_glimmer_assistant", "target_layer_ids": [1, 3, 5]},
    **{"block_size": 5, "mask_token_id": 60, "architectures": ["MuseGlimmerAssistantModel"]},
}
SPARK = {"markov_head_type": "vanilla", "markov_rank": 4, "enable_confidence_head": True}
SPARK |= {"confidence_head_with_markov": True, "block_size": 5, "mask_token_id": 60}
DEEP_SPEC = {**LAYERS, **SPARK, "architectures": ["Qwen3DSparkModel"]}
DEEP_SPEC |= {"target_layer_ids": [-1, 2, 4], "num_anchors": 16, "num_target_layers": 8}
SPEC_SPARK = {
    **{**SPARK, "speculators_model_type": "dspark", "aux_hidden_state_layer_ids": [2, 4, 6]},
    **{"draft_vocab_size": 61, "sample_from_anchor": True, "sliding_window_non_causal": False},
    "speculators_config": {**SPECULATORS["speculators_config"], "algorithm": "dspark"},
    NESTED: LAYERS,
}
SPEC_FLASH = {name: v for name, v in SPEC_SPARK.items() if "markov" not in name}
SPEC_FLASH |= {"speculators_model_type": "dflash", "sample_from_anchor": False}
del SPEC_FLASH["enable_confidence_head"]
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 64}


def weights(shapes):
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()}


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


def eagle_tensors(has_bias=True, **more):
    """EAGLE-1: the embedding is a copy of the target's that the head never trained."""
    shapes = {
        "embed_tokens.weight": (V, H),
        "fc.weight": (H, 2 * H),
        **layer("layers.0", H),
        **more,
    }
    return weights(shapes | ({"fc.bias": (H,)} if has_bias else {}))


def eagle3_tensors(prefix="midlayer", **more):
    norms = {f"{prefix}.{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm")}
    outer = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (D, H)}
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:D].sort().values
    marked = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    shapes = {**outer, **norms, **layer(prefix, 2 * H), **more}
    return {**weights(shapes), "d2t": ids - torch.arange(D), "t2d": marked}


def whole_eagle3_tensors(offset=0):
    maps = {"d2t": torch.zeros(V, dtype=torch.long), "t2d": torch.ones(V, dtype=torch.bool)}
    maps["d2t"][3] = offset
    return {**eagle3_tensors(**{"lm_head.weight": (V, H)}), **maps}


def medusa_tensors(num_heads, has_projections=True):
    shapes = {}
    for head in range(num_heads):
        shapes |= {f"{head}.0.linear.weight": (H, H), f"{head}.0.linear.bias": (H,)}
        shapes |= {f"{head}.1.weight": (V, H)} if has_projections else {}
    return weights(shapes)


def vllm_tensors(
    prefix="", has_biases=True, projections=("lm_heads.0", "lm_heads.1"), num_tokens=V
):
    blocks = {f"{prefix}blocks.{head}.layers.0.weight": (H, H) for head in range(2)}
    biases = {f"{prefix}blocks.{head}.layers.0.bias": (H,) for head in range(2)}
    own = {f"{prefix}{name}.weight": (num_tokens, H) for name in projections}
    return weights({**blocks, **(biases if has_biases else {}), **own})


def one_block_twice():
    shared, bias = torch.randn(H, H), torch.randn(H)
    blocks = [{f"0.{i}.linear.weight": shared, f"0.{i}.linear.bias": bias} for i in range(2)]
    return blocks[0] | blocks[1]


def block_tensors(**more):
    norms = {f"layers.0.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    norms |= {f"{name}.weight": (H,) for name in ("layers.0.input_layernorm", "norm")}
    fused = {"fc.weight": (H, 3 * H), "hidden_norm.weight": (H,)}
    return weights({**fused, **layer("layers.0", H), **norms, **more})


def assistant_tensors():
    names = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    return {names.get(name, name): tensor for name, tensor in block_tensors().items()}


def publish(folder, config, tensors, file=SAFE):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    save = save_file if file.endswith(".safetensors") else torch.save
    save(tensors, folder / file)
    return folder


class Case:
    """What is published, and what is to be found in it.

    Tensors keep their names, but for `names` (ours: theirs) and those that are `dropped`.
    """

    def __init__(self, config, tensors, names=(), dropped=(), files=(SAFE,), head=None, **found):
        self.config, self.tensors, self.files, self.head = config, tensors, files, head
        self.names, self.dropped, self.found = dict(names), dropped, found


def biased_attention():
    sizes = {"q": 32, "k": 16, "v": 16}.items()
    biases = {f"layers.0.self_attn.{n}_proj.bias": torch.ones(s).half() for n, s in sizes}
    return eagle_tensors(has_bias=False) | biases


def eagle3(head=None, names=(), dropped=(), more=(), tensors=None, found=None, **config):
    tensors = tensors or eagle3_tensors(**dict(more))
    return Case(EAGLE3 | config, tensors, names, dropped, head=head, **(found or {}))


def rope(config, **wanted):
    wanted = {"rope_theta": THETA, "rope_type": "default", **wanted}
    return eagle3(lambda head: head.config.rope_parameters == wanted, **config)


def is_plain(head):
    rope = head.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    return rope and (head.config.rms_norm_eps, head.config.max_position_embeddings) == (1e-5, 2048)


def is_reduced(head):
    ids = eagle3_tensors()["d2t"] + torch.arange(D)
    return head.taps == (2, 4, 5) and head.token_map.equal(ids)  # 2, L // 2, L - 3 of 8 layers


COPIES = {"lm_head.weight": (V, H), "layers.0.self_attn.rotary_emb.inv_freq": (HEAD_DIM // 2,)}
EMBEDDING, INPUT_NORM = {"embed_tokens.weight": (V, H)}, {"input_norm.weight": (3 * H,)}
TAP_NORMS = {f"fc_norm.{place}.weight": (H,) for place in range(3)}
QK_NORMS = {f"layers.0.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
NAMES = {"midlayer.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight"}
FLAT = eagle3_tensors("layers.0")
DEEP = eagle3_tensors(
    "layers.0", **layer("layers.1", H), **{"layers.1.input_layernorm.weight": (H,)}
)
NO_FLAGS = {"norm_before_residual": False, "norm_output": False, "own_embedding": False}
NORMS = {"norm_before_fc": True, "norm_output": True, "norm_before_residual": False}
SGLANG_FLAGS = {"norm_before_fc": True, "use_aux_hidden_state": True}
MEDUSA_NAMES = {"vocab_heads.2.weight": "2.1.weight", "blocks.1.0.linear.bias": "1.0.linear.bias"}
VLLM_NAMES = {"blocks.1.0.linear.bias": "blocks.1.layers.0.bias"}
VLLM_NAMES["vocab_heads.0.weight"] = "lm_heads.0.weight"
MARKOV = {f"markov_head.markov_w{place}.weight": (V, 4) for place in (1, 2)}
MARKOV |= {"confidence_head.proj.weight": (1, H + 4), "confidence_head.proj.bias": (1,)}
ENDS = {"embed_tokens.weight": (V, H), "lm_head.weight": (V, H)}
EAGLE_1 = {"layout": "eagle", "kind": "eagle", "bias": True, "qkv_bias": False, "tree": None}
CASES = {
    "eagle": Case(
        *(LLAMA, eagle_tensors(), (), [*EMBEDDING], (SAFE, BIN), is_plain),
        **{**EAGLE_1, "training": {}, "target": (None, H, V)},
    ),
    "eagle, copies": Case(LLAMA, eagle_tensors(**COPIES), dropped=[*COPIES, *EMBEDDING]),
    "eagle, biased attention": Case(
        {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "bias": False, "qkv_bias": True},
        biased_attention(),
        head=lambda head: head.layers[0].self_attn.q_proj.bias.sum() == 32,
    ),
    "eagle3": eagle3(is_reduced, found={"layout": "eagle3", "taps": None, **NO_FLAGS}),
    "eagle3 of SpecForge": eagle3(
        *(is_reduced, NAMES),
        tensors=eagle3_tensors("layers.0"),
        architectures=["LlamaForCausalLMEagle3"],
    ),
    "eagle3, layers of the target": eagle3(num_hidden_layers=40),
    "eagle3, whole vocabulary": eagle3(
        lambda head: head.token_map is None,
        dropped=["d2t", "t2d"],
        tensors=whole_eagle3_tensors(),
        draft_vocab_size=V,
    ),
    "eagle3, flags of SGLang": eagle3(
        more=INPUT_NORM, eagle_config=SGLANG_FLAGS, found={"norm_before_fc": True}
    ),
    "eagle3.1": eagle3(
        more=TAP_NORMS,
        **{"fc_norm": True, "norm_output": True},
        found={"fc_norm": True, "norm_output": True, "norm_before_fc": False},
    ),
    "rope of 4, plain": rope({"rope_theta": THETA}),
    "rope of 4, null": rope({"rope_theta": THETA, "rope_scaling": None}),
    "rope of 4, old name": rope(
        {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        **{"rope_type": "linear", "factor": 2.0},
    ),
    "rope of 4, llama3": rope({"rope_theta": THETA, "rope_scaling": LLAMA3}, **LLAMA3),
    "rope of 5": rope({"rope_parameters": {"rope_theta": THETA, **LLAMA3}}, **LLAMA3),
    "rope of 5, theta outside": rope(
        {"rope_theta": THETA, "rope_parameters": {"rope_type": "default"}}
    ),
    "taps of vLLM": eagle3(**{IDS: [2, 4, 6]}, found={"taps": [2, 4, 6]}),
    "taps of SGLang": eagle3(eagle_config={IDS: [1, 3, 5]}, found={"taps": [2, 4, 6]}),
    "taps of both": eagle3(
        **{IDS: [0, 4, 6], "eagle_config": {IDS: [-1, 3, 5]}}, found={"taps": [0, 4, 6]}
    ),
    "speculators": Case(
        *({**SPECULATORS, IDS: [1, 3, 6]}, eagle3_tensors("layers.0", **EMBEDDING), NAMES),
        head=lambda head: head.config.rope_parameters["rope_theta"] == THETA,
        **{"layout": "speculators", "taps": [1, 3, 6], "target": ("org/tiny", H, V)},
        **{"own_embedding": True, "norm_before_residual": True},
    ),
    "speculators, norms": Case(
        SPECULATORS | NORMS, eagle3_tensors("layers.0", **INPUT_NORM), **NORMS
    ),
    "speculators, 3.1 with a layer of Qwen3": Case(
        SPECULATORS | {"fc_norm": True},
        eagle3_tensors("layers.0", **TAP_NORMS, **QK_NORMS),
        head=lambda head: hasattr(head.midlayer.self_attn, "q_norm"),
        fc_norm=True,
    ),
    "speculators, two layers": Case(
        {**SPECULATORS, NESTED: {**LLAMA, "num_hidden_layers": 2}},
        DEEP,
        {"layers.1.mlp.up_proj.weight": "layers.1.mlp.up_proj.weight", **NAMES},
        head=lambda head: head.num_layers == 2,
        num_layers=2,
    ),
    "speculators, window": Case(
        {**SPECULATORS, NESTED: WINDOW},
        eagle3_tensors("layers.0"),
        training={"sliding_window": 2048},
    ),
    "z-lab": Case(
        *(Z_LAB, block_tensors()),
        head=lambda head: head.max_depth == 4,
        **{"layout": "z-lab", "kind": "dflash", "taps": [2, 4, 6], "mask_token_id": 60},
    ),
    "z-lab, layers that are not named": Case(
        {**Z_LAB, "dflash_config": {"mask_token_id": 60}},
        block_tensors(**{"fc.weight": (H, H)}),
        taps=[5],
    ),
    "transformers-assistant": Case(
        *(MUSE, assistant_tensors(), {"fc.weight": "encoder.fc.weight"}),
        **{"layout": "transformers-assistant", "taps": [2, 4, 6], "target": (None, H, None)},
    ),
    "deepspec": Case(
        *(DEEP_SPEC, block_tensors(**MARKOV, **ENDS)),
        head=lambda head: head.max_depth == 5,
        **{"layout": "deepspec", "taps": [0, 3, 5], "sample_from_anchor": True},
        **{"markov": "vanilla", "confidence_with_markov": True, "own_ends": True},
    ),
    "deepspec, no Markov head": Case(
        {**DEEP_SPEC, "markov_rank": 0, "enable_confidence_head": False},
        block_tensors(**ENDS),
        **{"markov": None, "confidence": False},
    ),
    "speculators-dflash, dspark": Case(
        *(SPEC_SPARK, block_tensors(**MARKOV)),
        head=lambda head: head.max_depth == 5,
        **{"layout": "speculators-dflash", "taps": [2, 4, 6], "target": ("org/tiny", H, V)},
    ),
    "speculators-dflash": Case(
        *(SPEC_FLASH, block_tensors()),
        head=lambda head: head.max_depth == 4,
        **{"layout": "speculators-dflash", "sample_from_anchor": False, "markov": None},
    ),
    "medusa": Case(
        *(MEDUSA_3, medusa_tensors(3), MEDUSA_NAMES, (), MEDUSA, lambda head: head.taps == (8,)),
        **{"kind": "medusa", "layout": "medusa", "tree": [[0], [0, 0], [1]]},
        target=("org/tiny", H, V),
    ),
    "medusa, version 2": Case(
        {"version": "2", "medusa_num_heads": 3, "medusa_num_layers": 1},
        medusa_tensors(3, has_projections=False),
        files=MEDUSA[:1],
        **{"own_vocab_head": False, "target": (None, H, None)},
    ),
    "medusa, blocks that were one object": Case(
        *(None, one_block_twice(), (), (), MEDUSA[1:]),
        lambda head: head.blocks[0][0].linear.weight.equal(head.blocks[0][1].linear.weight),
    ),
    "medusa, published miscount": Case(
        {**MEDUSA_3, "medusa_num_heads": 2}, medusa_tensors(5), files=MEDUSA, num_heads=5
    ),
    "vllm-medusa": Case(BIASED, vllm_tensors(), VLLM_NAMES, layout="vllm-medusa"),
    "vllm-medusa, prefixed": Case(
        *(BIASED, vllm_tensors("medusa_heads.")),
        {ours: f"medusa_heads.{theirs}" for ours, theirs in VLLM_NAMES.items()},
        layout="vllm-medusa",
    ),
    "vllm-medusa, reduced vocabulary": Case(
        {**BIASED, "truncated_vocab_size": 9},
        vllm_tensors(num_tokens=9) | {"token_map": torch.tensor([7, 3, 60, 0, 1, 2, 4, 5, 9])},
        {**VLLM_NAMES, "draft_ids": "token_map"},
        head=lambda head: head.token_map.tolist() == [7, 3, 60, 0, 1, 2, 4, 5, 9],
        target=(None, H, V),
        draft_vocab_size=9,
    ),
    "vllm-medusa, names of FasterDecoding": Case(
        BIASED, medusa_tensors(2), {"vocab_heads.1.weight": "1.1.weight"}
    ),
    "vllm-medusa, no biases": Case(
        *(VLLM, vllm_tensors(has_biases=False) | {"token_map": torch.arange(9)}),
        dropped=["token_map"],
        head=lambda head: head.blocks[1][0].linear.bias.eq(0).all(),
    ),
    **{
        f"vllm-medusa, copy of {copy}": Case(
            *({**BIASED, "original_lm_head": True}, vllm_tensors(projections=[copy])),
            dropped=[f"{copy}.weight"],
            own_vocab_head=False,
        )
        for copy in ("lm_head", "lm_heads.0")
    },
}
FILES = [(name, file) for name, case in CASES.items() for file in case.files]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_published_head_is_read(tmp_path, name, file):
    case = CASES[name]
    found = read_head(publish(tmp_path, case.config, case.tensors, file))
    identity = (found.target.name, found.target.hidden_size, found.target.vocab_size)
    facts = {**found.options, **vars(found), "target": identity}
    assert {key: facts.get(key) for key in case.found} == case.found
    assert found.target.weights is None
    assert not found.tensors.keys() & set(case.dropped)
    names = {**{n: n for n in found.tensors if n in case.tensors}, **case.names}
    assert all(torch.equal(found.tensors[o], case.tensors[t]) for o, t in names.items())
    check_target(found, identify_target(target()))
    head = build_head(found.kind, found.options, target())
    fill_head(head, found.tensors, str(tmp_path))
    assert case.head is None or case.head(head)


# Config, changes (... for a missing key), words of the refusal, and other tensors.
REFUSED = [
    (LLAMA, {"bias": False}, r"fc\.bias; is `bias` false in config", eagle_tensors()),
    (LLAMA, {}, r"lacks the tensor fc\.bias", eagle_tensors(has_bias=False)),
    (LLAMA, {}, r"not ask for: layers\.0\.norm", eagle_tensors(**{"layers.0.norm": (H,)})),
    (EAGLE3, {"draft_vocab_size": V}, "not ask for: d2t, t2d", whole_eagle3_tensors(offset=1)),
    (EAGLE3, {"use_aux_norm": True}, "use_aux_norm is True"),
    (EAGLE3, {"attention_bias": True}, "attention_bias is True"),
    (EAGLE3, {"logit_scale": 0.5}, "logit_scale is 0.5"),
    (EAGLE3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (EAGLE3, {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False"),
    (EAGLE3, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type must be one of"),
    (EAGLE3, {"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, "contradicts itself"),
    (EAGLE3, {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta 1000.* a number above 0"),
    (EAGLE3, {"hidden_size": None}, "hidden_size is missing"),
    (EAGLE3, {"intermediate_size": "64"}, "intermediate_size is '64'"),
    (EAGLE3, {IDS: [2, 4], "eagle_config": {IDS: [2, 4]}}, r"must be \[1, 3\] there"),
    (EAGLE3, {IDS: "2,4,6"}, "must be a list"),
    (EAGLE3, {IDS: [2, 4, True]}, "2 is True but must be a whole number"),
    (EAGLE3, {"eagle_config": {IDS: []}}, "must be a list of at least 1"),
    (EAGLE3, {IDS: [2, 4]}, r"fc\.weight has shape \(32, 96\) but must have \(32, 64\)"),
    (SPECULATORS, {"speculators_model_type": "medusa"}, "'medusa' but must be one of"),
    (
        Z_LAB,
        {"layer_types": ["sliding_attention"]},
        "layer_types sliding_attention but all must be",
    ),
    (Z_LAB, {"num_target_layers": ..., "dflash_config": {"mask_token_id": 1}}, "has neither"),
    (Z_LAB, {"dflash_config": {"target_layer_ids": [1]}}, "mask_token_id is missing"),
    (Z_LAB, {"block_size": ...}, "block_size is missing"),
    (SPEC_SPARK, {"sample_from_anchor": ...}, "sample_from_anchor is missing"),
    (SPEC_SPARK, {"draft_vocab_size": D}, "draft_vocab_size 40, but block heads draft all 61"),
    (DEEP_SPEC, {"markov_head_type": "rnn"}, "markov_head_type is 'rnn'"),
    (SPECULATORS, {"norm_before_residual": ...}, "for true and speculators for false"),
    (SPECULATORS, {NESTED: ...}, f"{NESTED} is missing"),
    (SPECULATORS, {NESTED: MIXED}, "a window bounds all layers of a head, or none"),
    (
        SPECULATORS,
        {NESTED: {**LLAMA, "num_hidden_layers": 2}},
        r"lacks the tensor layers\.1\.",
        FLAT,
    ),
    (SPECULATORS, {NESTED: LLAMA}, "of speculators, whose config counts them", DEEP),
    (SPECULATORS, {NESTED: {**LLAMA, "mlp_bias": True}}, f"{NESTED}.mlp_bias is True"),
    (MEDUSA_3, {}, r"medusa_num_heads 3 but .* holds 5", medusa_tensors(5), MEDUSA[1]),
    (VLLM, {}, r"blocks\.0\.layers\.0\.bias.*medusa_fc_bias to true", vllm_tensors()),
    (BIASED, {"truncated_vocab_size": 9}, "lacks the tensor token_map", vllm_tensors()),
    (
        *(BIASED, {"truncated_vocab_size": 9, "original_lm_head": True}),
        *("draft_vocab_size is for projections of their own", vllm_tensors()),
    ),
    (BIASED, {"truncated_vocab_size": 99}, "draft_vocab_size is 99 but the target has 61 tokens"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case[2] for case in REFUSED])
def test_published_head_is_refused_by_name(tmp_path, case):
    config, change, said, *rest = case
    tensors, file = (*rest, *(eagle3_tensors(), SAFE)[len(rest) :])
    config = {key: value for key, value in (config | change).items() if value is not ...}
    publish(tmp_path, config, tensors, file)
    with pytest.raises(ValueError, match=said) as caught:
        read_head(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_narrow_eagle3_head_brings_embedding(tmp_path):
    tensors = eagle3_tensors(**EMBEDDING, **{"fc.weight": (H, 3 * 48)})
    found = read_head(publish(tmp_path, {**EAGLE3, "target_hidden_size": 48}, tensors))
    assert (found.target.hidden_size, found.options["target_hidden_size"]) == (48, 48)
    assert found.options["own_embedding"] is True
    with pytest.raises(ValueError, match=r"hidden_size 48, but .* hidden_size 32"):
        check_target(found, identify_target(target()))


def test_head_is_found_among_other_files(tmp_path):
    publish(tmp_path, LLAMA, {"x": torch.ones(1)}, BIN)
    assert read_head(publish(tmp_path, LLAMA, eagle_tensors())).kind == "eagle"
    config = {**LLAMA, "num_hidden_layers": 32, "medusa_num_heads": 2}
    publish(tmp_path, config, medusa_tensors(2), "medusa_lm_head.pt")
    assert read_head(tmp_path).kind == "medusa"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_taps_are_written_as_engines_count(tmp_path):
    config = config_of(write_head(random_head("eagle3"), tmp_path / "flat", "eagle3"))
    assert config[IDS] == [1, 4, 6]
    assert config["eagle_config"] == {IDS: [0, 3, 5], "use_aux_hidden_state": True}
    config = config_of(write_head(random_head("eagle3"), tmp_path / "nested", "speculators"))
    assert config[IDS] == [1, 4, 6]
    assert "eagle_config" not in config


def test_published_taps_are_left_out(tmp_path):
    head = random_head("eagle3-whole")
    assert head.options["taps"] == [2, 4, 5]
    config = config_of(write_head(head, tmp_path / "known", "eagle3"))
    assert not {IDS, "eagle_config"} & config.keys()
    unknown = replace(head, target=replace(head.target, num_layers=None))
    assert config_of(write_head(unknown, tmp_path / "unknown", "eagle3"))[IDS] == [2, 4, 5]
    assert config_of(write_head(head, tmp_path / "nested", "speculators"))[IDS] == [2, 4, 5]


def test_foreign_head_on_last_layer_is_refused(tmp_path):
    found = read_head(publish(tmp_path, {**EAGLE3, IDS: [2, 4, 8]}, eagle3_tensors()))
    identity = random_head("eagle3").target
    with pytest.raises(ValueError, match=r"hidden_states\[8\].* before the final norm"):
        check_target(found, identity)
    check_target(replace(found, layout="specdec"), identity)
