"""Small random models and heads: float32, built locally, different enough to disagree."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.checkpoints import HeadCheckpoint, identify_target, write_head
from specdec.drafters.heads import Head, build_head
from specdec.targets.hf import HFTarget


def tiny_llama(vocab_size: int = 97, num_layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose next-token distributions are neither flat nor certain."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def perturbed(model: LlamaForCausalLM, amount: float, seed: int = 1) -> LlamaForCausalLM:
    """A copy that agrees with the model often, but not always: a drafter for it."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.ndim == 2:
                weight.add_(amount * weight.std() * torch.randn(weight.shape, generator=noise))
    return copy


def tiny_target(vocab_size: int = 97, num_layers: int = 2, seed: int = 0) -> HFTarget:
    """A target of a tiny Llama; SPECDEC_COMPILED=1 in the environment compiles all of them."""
    is_compiled = os.environ.get("SPECDEC_COMPILED") == "1"
    return HFTarget(tiny_llama(vocab_size, num_layers, seed), compile=is_compiled)


def tiny_head(kind: str, target: Any, seed: int = 0, **options: Any) -> Head:
    """A random head whose guesses are neither flat nor certain, in eval mode."""
    torch.manual_seed(seed)
    head = build_head(kind, options, target)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if name.startswith("lm_head"):
                weight.mul_(8)
    return head.eval()


def save_tiny_head(
    folder: str | Path, kind: str, target: Any, seed: int = 0, **options: Any
) -> str:
    """The folder, as a path that `load_drafter` takes."""
    head = tiny_head(kind, target, seed, **options)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    write_head(HeadCheckpoint(kind, options, tensors, target=identify_target(target)), folder)
    return str(folder)
