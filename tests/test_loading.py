"""What is wrong with a checkpoint is said in words, and ends the command with status 2."""

import json

import pytest
import torch
from checkpoints import WEIGHTS, edit_weights, save_checkpoint, save_tokenizer
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import load_drafter, load_target
from specdec.cli import app


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "model")


def generate(folder, *options):
    arguments = ["generate", "--prompt", "abc", "--target", str(folder), "--max-new-tokens", "2"]
    return CliRunner().invoke(app, [*arguments, *options])


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr
    return True


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), ["missing tensors (1)", "model.norm.weight"]),
        (lambda w: w.update(other=torch.ones(3)), ["unexpected tensors (1)", "other"]),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(7)}),
            ["model.norm.weight has shape (7,) but must have (32,)"],
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_misfit_tensors_are_named(checkpoint, change, words):
    edit_weights(checkpoint, change)
    assert refused(generate(checkpoint), "does not fit its config", *words)


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_truncated_weights_are_named(checkpoint, keep):
    cut(checkpoint / WEIGHTS, keep)
    assert refused(generate(checkpoint), str(checkpoint), "corrupt or truncated", "copy")


def test_pointer_instead_of_weights_is_named(checkpoint):
    (checkpoint / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    assert refused(generate(checkpoint), "corrupt or truncated")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_a_missing_or_damaged_file_is_named(checkpoint, name):
    path = checkpoint / name
    cut(path, 10)
    assert refused(generate(checkpoint), str(checkpoint))
    path.unlink()
    if name == "tokenizer.json":
        (checkpoint / "tokenizer_config.json").unlink()
        assert refused(generate(checkpoint), "no tokenizer")
    else:
        assert refused(generate(checkpoint), str(checkpoint), name.split(".")[0])


def test_a_missing_shard_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shard = sorted((tmp_path / "model").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert refused(generate(tmp_path / "model"), shard.name)


def with_json(name, **values):
    def change(folder):
        path = folder / name
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | values))

    return change


def with_int8(folder):
    edit_weights(folder, lambda w: w.update({NAME: w[NAME].to(torch.int8)}))


def without_end(folder):
    (folder / "generation_config.json").write_text("{")


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGES = [
    (with_int8, f"{NAME} as I8"),
    (without_end, "generation_config.json"),
    (with_json("generation_config.json", eos_token_id="x"), "eos_token_id 'x'"),
    (with_json("config.json", max_position_embeddings=0), "names no context length"),
    (with_json("config.json", vocab_size=10**12), "a size in it wrong"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_what_transformers_takes_without_a_word_is_refused(checkpoint, change, said):
    change(checkpoint)
    with pytest.raises(ValueError, match=said):
        load_target(str(checkpoint), device="cpu")


def test_draft_model_with_infinite_weights_is_refused(checkpoint):
    edit_weights(checkpoint, lambda w: w[NAME][0].fill_(float("inf")))
    target = load_target(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinite"):
        load_drafter({"type": "draft_model", "path": str(checkpoint)}, target)


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "~/no/such/folder"])
def test_a_path_that_is_not_there_is_named(path):
    assert refused(generate(path), repr(path), "is not a folder", "hub id")


def test_missing_device_is_refused_first(checkpoint):
    assert refused(generate(checkpoint, "--device", "banana"), "'banana'", "cpu, cuda or cuda:N")
    assert refused(generate(checkpoint, "--device", "cuda:99"), "'cuda:99'", "use cpu")
    assert refused(generate(checkpoint, "--dtype", "int8"), "'int8'", "float32")


def test_logits_that_are_not_numbers_fail_the_run(checkpoint):
    edit_weights(checkpoint, lambda w: w["model.norm.weight"].fill_(float("nan")))
    done = generate(checkpoint)
    assert done.exit_code == 1
    assert "prompt 0, token 0: the target's logits are NaN" in done.stderr
    assert "check the weights" in done.stderr


def test_oversized_weights_name_free_memory(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    done = generate(checkpoint)
    assert done.exit_code == 1
    assert f"no memory for the weights of {str(checkpoint)!r}" in done.stderr
    assert f"hold {(checkpoint / WEIGHTS).stat().st_size:,} bytes" in done.stderr
    assert "are free" in done.stderr
    assert "quantization=4bit" in done.stderr


@pytest.mark.parametrize("positions", [10**13, 10**30])
def test_large_config_number_takes_no_memory(checkpoint, positions):
    config = json.loads((checkpoint / "config.json").read_text())
    text = json.dumps({**config, "max_position_embeddings": positions})
    (checkpoint / "config.json").write_text(text)
    assert generate(checkpoint, "--drafter", "ngram").exit_code == 0


def test_a_prompt_longer_than_the_context_is_measured(checkpoint):
    arguments = ["generate", "--prompt", "a" * 300, "--target", str(checkpoint)]
    done = CliRunner().invoke(app, arguments)
    assert refused(done, "prompt 0 has 300 tokens", "context holds 256", "shorten")


def test_an_empty_prompt_is_refused(checkpoint):
    done = CliRunner().invoke(app, ["generate", "--prompt", "", "--target", str(checkpoint)])
    assert refused(done, "prompt 0 is empty", "at least one token")


def test_a_drafter_with_another_tokenizer_is_refused(checkpoint, tmp_path):
    other = save_checkpoint(tmp_path / "other")
    save_tokenizer(other, first=8)
    drafter = f'{{"type": "draft_model", "path": "{other}"}}'
    done = generate(checkpoint, "--drafter", drafter)
    assert refused(done, str(other), "another tokenizer", "97 of 97", "the target's own tokenizer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "draft_model"}, "needs the option 'path'"),
        ({"type": "ngram", "max_ngram": "wide"}, "max_ngram='wide'"),
        ({"type": "draft_modell"}, "did you mean 'draft_model'"),
    ],
)
def test_options_that_a_drafter_cannot_use_are_named(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        load_drafter(options, load_target(str(checkpoint)))
