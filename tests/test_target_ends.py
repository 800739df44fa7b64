"""The ends of a target alone: what heads are built from, and nothing else is needed or taken."""

import pytest
import torch
from checkpoints import edit_weights, save_checkpoint
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from specdec.checkpoints import identify_target
from specdec.checkpoints.identity import hash_of_ends
from specdec.drafters.heads import build_head
from specdec.targets.load import load_ends, load_target


def keep_only_the_ends(weights):
    for name in [name for name in weights if "layers" in name or name == "model.norm.weight"]:
        del weights[name]


def tied_llama():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=[5, 7],
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_heads_start_the_same_from_the_ends_as_from_the_whole_target(tmp_path, kind, make):
    path = str(save_checkpoint(tmp_path, make()))
    target = load_target(path, device="cpu")
    edit_weights(tmp_path, keep_only_the_ends)
    ends = load_ends(path, device="cpu")
    heads = []
    for each in (target, ends):
        torch.manual_seed(0)
        heads.append(build_head(kind, {}, each).state_dict())
    assert heads[0].keys() == heads[1].keys()
    assert all(heads[0][name].equal(heads[1][name]) for name in heads[0])


def test_the_ends_tell_what_the_target_tells(tmp_path):
    path = str(save_checkpoint(tmp_path, tied_llama()))
    target, ends = load_target(path, device="cpu"), load_ends(path, device="cpu")
    for name in ("vocab_size", "max_context_len", "eos_token_ids", "device"):
        assert getattr(ends, name) == getattr(target, name)
    assert ends.eos_token_ids == (5, 7)
    assert ends.model.dtype == target.model.dtype
    assert ends.config.to_dict() == target.config.to_dict()
    assert ends.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    assert ends.model.lm_head.weight is ends.model.model.embed_tokens.weight
    states = torch.randn(3, 32)
    wanted = target.model.get_output_embeddings()(states)
    assert ends.model.get_output_embeddings()(states).equal(wanted)
    assert hash_of_ends(ends.model) == hash_of_ends(target.model)


def test_the_ends_never_pass_for_the_whole_target(tmp_path):
    path = str(save_checkpoint(tmp_path))
    whole, part = identify_target(load_target(path, device="cpu")), identify_target(load_ends(path))
    assert part.weights is None
    assert part.tokenizer == whole.tokenizer


def test_sharded_checkpoints_and_other_dtypes_are_read(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    ends = load_ends(str(tmp_path), device="cpu", dtype="bfloat16")
    assert ends.tokenizer is None
    assert ends.model.model.embed_tokens.weight.equal(model.model.embed_tokens.weight.bfloat16())
    assert ends.model.lm_head.weight.equal(model.lm_head.weight.bfloat16())
    for file in tmp_path.glob("*.safetensors"):
        if not {"lm_head.weight", "model.embed_tokens.weight"} & load_file(file).keys():
            file.unlink()  # these are never asked for
    load_ends(str(tmp_path), device="cpu")


def test_names_without_the_prefix_of_the_base_model_are_found(tmp_path):
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config)
    save_checkpoint(tmp_path, model)

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    edit_weights(tmp_path, strip)
    ends = load_ends(str(tmp_path), device="cpu")
    assert ends.model.transformer.wte.weight.equal(model.transformer.wte.weight)
    assert ends.max_context_len == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("lm_head.weight"),
            "must hold lm_head.weight .* holds nothing",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": torch.zeros(96, 32)}),
            r"shape \(97, 32\) but holds torch.float32 \(96, 32\)",
        ),
        (
            lambda weights: weights.update(
                {"model.embed_tokens.weight": torch.zeros(97, 32, dtype=torch.int8)}
            ),
            "holds torch.int8 .* quantized",
        ),
    ],
)
def test_ends_that_are_missing_or_of_another_shape_are_refused(tmp_path, change, message):
    save_checkpoint(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_ends(str(tmp_path), device="cpu")


def test_damaged_or_missing_files_are_refused(tmp_path):
    save_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        load_ends(str(tmp_path), device="cpu")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        load_ends(str(tmp_path), device="cpu")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_ends("./nothing")


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    save_checkpoint(tmp_path, Gemma3ForCausalLM(config))
    with pytest.raises(ValueError, match=r"does more than nn\.Embedding; train beside"):
        load_ends(str(tmp_path), device="cpu")
