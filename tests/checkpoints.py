"""Checkpoints on disk that are small, whole or broken on purpose."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"


def save_tokenizer(folder: Path, first: int = 0) -> None:
    """One token a character; another `first` is another tokenizer with the same characters."""
    letters = {chr(32 + (i + first) % 97): i for i in range(97)}
    inner = Tokenizer(models.WordLevel(letters, unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="~").save_pretrained(folder)


def save_checkpoint(folder: Path, model=None) -> Path:
    (model or tiny_llama()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def edit_weights(folder: Path, change) -> None:
    """Apply `change` to the dictionary of tensors of a checkpoint."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
