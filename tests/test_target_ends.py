"""The ends of a target alone: what heads are built from, and nothing else is needed or taken."""

import pytest
import torch
from checkpoints import edit_weights, save_checkpoint
from model_matrix import BOTH, HEAD, build
from safetensors.torch import load_file
from tiny_models import tiny_llama

from specdec.checkpoints import identify_target
from specdec.checkpoints.identity import hash_of_ends
from specdec.drafters.heads import build_head
from specdec.targets.load import load_ends, load_target


def tied_llama():
    model = build("Llama", {"tie_word_embeddings": True, "vocab_size": 97})
    model.config.eos_token_id = model.generation_config.eos_token_id = [5, 7]
    return model


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_heads_start_the_same_from_the_ends_as_from_the_whole_target(tmp_path, kind, make):
    path = str(save_checkpoint(tmp_path, make()))
    target = load_target(path, device="cpu")
    edit_weights(tmp_path, lambda w: [w.pop(n) for n in list(w) if "layers" in n or "norm" in n])
    heads = []
    for each in (target, load_ends(path, device="cpu")):
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
    whole, part = identify_target(target), identify_target(ends)
    assert part.weights is None  # they never pass for the whole target
    assert (part.tokenizer, part.facts) == (whole.tokenizer, whole.facts)
    assert part.magnitudes.items() <= whole.magnitudes.items()
    assert [*part.magnitudes] == ["model.embed_tokens.weight"]


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
    model = build("GPT2LMHeadModel", {"tie_word_embeddings": True})
    save_checkpoint(tmp_path, model)

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    edit_weights(tmp_path, strip)
    ends = load_ends(str(tmp_path), device="cpu")
    assert ends.model.transformer.wte.weight.equal(model.transformer.wte.weight)
    assert ends.max_context_len == 64


HEAD_NAME, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"


def changed(change):
    return lambda folder: edit_weights(folder, change)


def damaged(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"\xff" * 8 + content[8:])


REFUSED = [
    (changed(lambda weights: weights.pop(HEAD_NAME)), "must hold lm_head.weight .* holds nothing"),
    (
        changed(lambda weights: weights.update({HEAD_NAME: torch.zeros(96, 32)})),
        r"shape \(97, 32\) but holds torch.float32 \(96, 32\)",
    ),
    (
        changed(lambda weights: weights.update({EMBEDDING: weights[EMBEDDING].char()})),
        "holds torch.int8 .* quantized",
    ),
    (damaged, "corrupt or truncated"),
    (lambda folder: (folder / WEIGHTS).unlink(), "only safetensors are read"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (
        lambda folder: build("Gemma3", HEAD | BOTH).save_pretrained(folder),
        r"does more than nn\.Embedding; train beside",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_checkpoint_without_the_ends_is_refused(tmp_path, change, message):
    change(save_checkpoint(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_ends(str(tmp_path), device="cpu")
