"""Families of transformers, tiny and random, and what is said of each: equal, or refused.

`python tests/model_matrix.py` writes docs/models.md from the table below, which
tests/test_model_matrix.py proves.
"""

import math
import random
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from specdec.engine.metrics import ForwardClock
from specdec.verify import Draft

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
VOCAB, WINDOW = 13, 6
OPTIONS: dict[str, dict[str, Any]] = yaml.safe_load(
    """
shape: {vocab_size: 13, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64,
  tie_word_embeddings: false, bos_token_id: null, eos_token_id: null, pad_token_id: null}
special: {bos_token_id: 1, eos_token_id: 2, pad_token_id: 0}
eager: {attn_implementation: eager}
head: {head_dim: 8}
sliding: {sliding_window: 6}
both: {sliding_window: 6, layer_types: [sliding_attention, full_attention]}
qwen_sliding: {sliding_window: 6, use_sliding_window: true, max_window_layers: 1}
moe: {num_experts: 4, num_local_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16,
  shared_expert_intermediate_size: 16}
mla: {num_key_value_heads: 4, kv_lora_rank: 8, q_lora_rank: 16, qk_rope_head_dim: 8,
  qk_nope_head_dim: 8, v_head_dim: 8, head_dim: 8, n_routed_experts: 4, num_experts_per_tok: 2,
  n_group: 1, topk_group: 1, first_k_dense_replace: 1, moe_intermediate_size: 16}
gemma4: {sliding_window: 6, num_hidden_layers: 4, num_kv_shared_layers: 0,
  layer_types: [sliding_attention, full_attention, sliding_attention, full_attention],
  hidden_size_per_layer_input: 8, vocab_size_per_layer_input: 13,
  activation_sparsity_pattern: [0.0, 0.0, 0.0, 0.0]}
mimo: {head_dim: 8, sliding_window: 6, layer_types: [sliding_attention, full_attention],
  v_head_dim: 8, moe_intermediate_size: 16, n_routed_experts: 4, num_experts_per_tok: 2,
  mlp_layer_types: [dense, sparse]}
delta: {num_hidden_layers: 3, layer_types: [linear_attention, full_attention, linear_attention],
  linear_num_value_heads: 4, linear_num_key_heads: 2, linear_key_head_dim: 8,
  linear_value_head_dim: 12, linear_conv_kernel_dim: 4}
mamba2: {num_hidden_layers: 3, layer_types: [mamba, attention, mamba], mamba_n_heads: 8,
  mamba_d_head: 8, mamba_n_groups: 2, mamba_d_state: 8, mamba_d_conv: 4, mamba_expand: 2,
  mamba_chunk_size: 8}
nemotron: {num_hidden_layers: 4, layers_block_type: [mamba, attention, mlp, mamba], head_dim: 8,
  mamba_num_heads: 8, mamba_head_dim: 8, n_groups: 2, ssm_state_size: 8, conv_kernel: 4,
  chunk_size: 8, expand: 2}
"""
)
SHAPE, SPECIAL, EAGER, HEAD, SLIDING, BOTH, QWEN_SLIDING, MOE, MLA, GEMMA4, MIMO, *_ = (
    OPTIONS.values()
)
DELTA, MAMBA2, NEMOTRON = (OPTIONS[name] for name in ("delta", "mamba2", "nemotron"))
PARALLEL = {key: value for key, value in MAMBA2.items() if key != "layer_types"}
GEMMA3N, SHARED = GEMMA4 | HEAD | {"laurel_rank": 4}, {"num_kv_shared_layers": 2}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


ORIGINAL = {"original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0], "factor": 4.0}
LONG = rope("longrope", **FACTORS, **ORIGINAL) | ORIGINAL
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REASONS = {
    "in a tree": "position biases by slot, which a draft tree breaks",
    "masks of its own behind": "masks of its own, counted in slots",
    "does not run": "does not take a cache and masks from outside",
    "cannot be rolled back": "a rejected token would stay in its state",
    "names no context length": "no context length, and position biases (ALiBi)",
    "encoder-decoder": "an encoder-decoder",
}
TREE, OWN, RUNS, STATE, LENGTH, SEQ2SEQ = REASONS
# Class without "ForCausalLM", variant, changes to SHAPE, and why it is refused.
CASES: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("Llama", "", {}, None),
    ("Llama", "eager", EAGER, None),
    ("Llama", "linear rope", rope("linear", factor=2.0), None),
    ("Llama", "dynamic rope", rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}, None),
    ("Llama", "yarn", rope("yarn", factor=4.0, **ORIGINAL), None),
    ("Llama", "llama3 rope", rope("llama3", **BANDS, **ORIGINAL), None),
    ("Phi3", "LongRoPE, up to its original length", LONG, None),
    ("Phi3", "window, eager", SLIDING | EAGER, None),
    ("Phi", "partial rotary", {}, None),
    ("Phimoe", "window", SLIDING | MOE, None),
    ("Mistral", "window", SLIDING, None),
    ("Mistral", "window, eager", SLIDING | EAGER, None),
    ("Mixtral", "MoE, window", SLIDING | MOE, None),
    ("Ministral3", "", {}, None),
    ("Qwen2", "", {}, None),
    ("Qwen2", "window in the upper layers", QWEN_SLIDING, None),
    ("Qwen2Moe", "MoE, window in the upper layers, eager", QWEN_SLIDING | MOE | EAGER, None),
    ("Qwen3", "window in the upper layers, eager", HEAD | QWEN_SLIDING | EAGER, None),
    ("Qwen3Moe", "MoE", HEAD | MOE, None),
    ("Gemma", "", HEAD, None),
    ("Gemma2", "soft caps, window, eager", HEAD | BOTH, None),
    ("Gemma3", "window, two ropes", HEAD | BOTH, None),
    ("Gemma3", "window, two ropes, eager", HEAD | BOTH | EAGER, None),
    ("Gemma3n", "layers that share keys", GEMMA3N | SHARED, None),
    ("Gemma4", "layers that share keys", GEMMA4 | SHARED, None),
    ("Gemma4", "layers that share keys, eager", GEMMA4 | SHARED | EAGER, None),
    ("VaultGemma", "window, eager", HEAD | BOTH, None),
    ("GptOss", "sinks, MoE, window, eager", HEAD | BOTH | MOE, None),
    ("MiMoV2Flash", "sinks, MoE, window, eager", MIMO, None),
    ("Olmo2", "", {}, None),
    ("Olmo3", "window", BOTH, None),
    ("Starcoder2", "window", SLIDING, None),
    ("Cohere", "", {}, None),
    ("Cohere2", "window, no rope in full layers", BOTH, None),
    ("Exaone4", "window, no rope in full layers, eager", BOTH | EAGER, None),
    ("SmolLM3", "no rope in some layers", {"no_rope_layers": [0, 1]}, None),
    ("DeepseekV3", "MLA, MoE", MLA, None),
    ("DeepseekV2", "MLA, MoE, eager", MLA | EAGER, None),
    ("MiniMaxM2", "MoE", HEAD | MOE, None),
    ("Granite", "eager", EAGER, None),
    ("GraniteMoe", "MoE", MOE, None),
    ("Glm4", "", HEAD, None),
    ("StableLm", "partial rotary", {}, None),
    ("Nemotron", "", {}, None),
    ("DiffLlama", "differential attention", {}, None),
    ("ModernBertDecoder", "window", {"local_attention": WINDOW} | BOTH | SPECIAL, None),
    ("Falcon", "one key head", {"multi_query": True}, None),
    ("Falcon", "new architecture", {"new_decoder_architecture": True, "num_kv_heads": 2}, None),
    ("GPTNeoX", "", {}, None),
    ("GPT2LMHeadModel", "", {}, None),
    ("GPT2LMHeadModel", "eager", EAGER, None),
    ("GPTBigCode", "one key head", {}, None),
    ("GPTJ", "", {"rotary_dim": 4}, None),
    ("CodeGen", "", {"rotary_dim": 4}, None),
    ("OPT", "", {"word_embed_proj_dim": 32, "ffn_dim": 48}, None),
    ("BioGpt", "", {}, None),
    ("XGLM", "", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, None),
    ("Qwen3Next", "gated delta rule, MoE", HEAD | MOE | DELTA, None),
    ("Qwen3_5", "gated delta rule", HEAD | DELTA, None),
    ("Qwen3_5", "gated delta rule, eager", HEAD | DELTA | EAGER, None),
    ("OlmoHybrid", "gated delta rule", DELTA, None),
    ("Bamba", "Mamba-2", PARALLEL | {"attn_layer_indices": [1]}, None),
    ("GraniteMoeHybrid", "Mamba-2", MAMBA2 | {"num_local_experts": 0}, None),
    ("NemotronH", "Mamba-2", NEMOTRON, None),
    ("FalconH1", "Mamba-2 beside attention", HEAD | PARALLEL | {"mamba_d_ssm": 64}, None),
    ("Lfm2", "short convolutions", {"layer_types": ["conv", "full_attention"]}, None),
    ("Falcon", "ALiBi", {"alibi": True}, RUNS),
    ("Bloom", "ALiBi", {"max_position_embeddings": None}, LENGTH),
    ("Mpt", "ALiBi", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, TREE),
    ("GPTNeo", "window", {"attention_types": [[["global", "local"], 1]], "window_size": 32}, OWN),
    ("Doge", "dynamic mask", {"keep_window_size": 32}, OWN),
    ("OpenAIGPTLMHeadModel", "", {}, RUNS),
    ("MiniMax", "linear attention", {}, STATE),
    ("Llama4", "chunked attention", HEAD | MOE | {"attention_chunk_size": WINDOW}, STATE),
    ("Mamba", "", {}, STATE),
    ("Rwkv", "", {}, STATE),
    ("Jamba", "", {}, STATE),
    ("KimiLinear", "decays by channel", {}, STATE),
    ("RecurrentGemma", "", HEAD, STATE),
    ("T5ForConditionalGeneration", "", {}, SEQ2SEQ),
    ("BartForConditionalGeneration", "", {}, SEQ2SEQ),
]


def build(name: str, changes: dict[str, Any]) -> Any:
    """A model whose attention decides its next token: random weights, logits far apart."""
    whole = getattr(transformers, name, None)
    model_class = whole if whole else getattr(transformers, f"{name}ForCausalLM")
    options = SHAPE | changes
    attention = options.pop("attn_implementation", None)
    config = model_class.config_class(**options)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]), generator=rng)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


class Scripted:
    """Drafts a tree around the text that the target will write, right and wrong in turns."""

    taps, max_nodes, makes_trees = (), 5, True

    def __init__(self, texts: dict[tuple[int, ...], list[int]]) -> None:
        self.texts, self.clock = texts, ForwardClock(torch.device("cpu"))
        self._random = random.Random(0)

    def begin(self, prompts: Any, output: Any, sampler: Any, *, join: bool = False) -> None:
        self._rows = [[self.texts[tuple(prompt[:-1])], 1] for prompt in prompts]

    def propose(self, root: torch.Tensor, budget: list[int], sampler: Any) -> Draft:
        """A wrong child of the root, the right one, and behind it the same again, then one more."""
        rows = []
        for text, place in self._rows:
            right = [*text[place : place + 3], 0, 0, 0]
            wrong = [(token + self._random.randrange(1, VOCAB)) % VOCAB for token in right]
            last = self._random.choice([right[2], wrong[2]])
            rows.append([wrong[0], right[0], wrong[1], right[1], last])
        parents = torch.tensor([[-1, -1, 1, 1, 3]] * len(rows))
        lengths = torch.tensor([min(limit, 5) for limit in budget])
        past = torch.arange(5) >= lengths.unsqueeze(1)
        tokens = torch.tensor(rows).masked_fill(past, -1)
        return Draft.tree(tokens, parents.masked_fill(past, -1), lengths, depth=3)

    def observe(self, verdict: Any, committed: Any, hidden: Any) -> None:
        for row, tokens in zip(self._rows, committed, strict=True):
            row[1] += len(tokens)

    def reorder(self, rows: torch.Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]


def render() -> str:
    """The page with the table written anew."""
    head = DOCS.read_text().split("| --- |")[0]
    lines = ["| --- | --- | --- |"]
    for name, variant, _, refusal in CASES:
        whole = name if hasattr(transformers, name) else f"{name}ForCausalLM"
        answer = f"refused: {REASONS[refusal]}" if refusal else "equal"
        lines.append(f"| `{whole}` | {variant or '-'} | {answer} |")
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS.write_text(render())
