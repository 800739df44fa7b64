"""What is wrong with a checkpoint is said in words, and ends the command with status 2."""

import json
from itertools import chain

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
    given = {"--prompt": "abc", "--target": str(folder), "--max-new-tokens": "2"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    return CliRunner().invoke(app, ["generate", *chain.from_iterable(given.items())])


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr
    return True


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def weights(change):
    return lambda folder: edit_weights(folder, change)


def with_json(name, **values):
    def change(folder):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut_to(name, keep):
    return lambda folder: cut(folder / name, keep)


def as_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")


def without_a_shard(folder):
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*-of-*.safetensors"))[1].unlink()
    (folder / WEIGHTS).unlink(missing_ok=True)


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
MISFIT = "does not fit its config"
DAMAGES = [
    (weights(lambda w: w.pop(NORM)), [MISFIT, "missing tensors (1)", NORM]),
    (weights(lambda w: w.update(other=torch.ones(3))), [MISFIT, "unexpected tensors (1)", "other"]),
    (
        weights(lambda w: w.update({NORM: torch.ones(7)})),
        [MISFIT, "shape (7,) but must have (32,)"],
    ),
    (with_json("config.json", num_hidden_layers=3), [MISFIT]),
    *[(cut_to(WEIGHTS, keep), ["corrupt or truncated", "copy"]) for keep in (0, 5, 300, -100)],
    (as_pointer, ["corrupt or truncated"]),
    (cut_to("config.json", 10), ["model"]),
    (cut_to("tokenizer.json", 10), ["model"]),
    (without("config.json"), ["config.json"]),
    (without(WEIGHTS), ["model"]),
    (without("tokenizer.json", "tokenizer_config.json"), ["no tokenizer"]),
    (without_a_shard, ["00002-of-"]),
    (weights(lambda w: w.update({UP: w[UP].to(torch.int8)})), [f"{UP} as I8"]),
    (cut_to("generation_config.json", 1), ["generation_config.json"]),
    (with_json("generation_config.json", eos_token_id="x"), ["eos_token_id 'x'"]),
    (with_json("config.json", max_position_embeddings=0), ["names no context length"]),
    (with_json("config.json", vocab_size=10**12), ["a size in it wrong"]),
]


@pytest.mark.parametrize(("change", "words"), DAMAGES, ids=[words[-1] for _, words in DAMAGES])
def test_damaged_checkpoint_is_refused(checkpoint, change, words):
    change(checkpoint)
    assert refused(generate(checkpoint), *words)


def test_draft_model_with_infinite_weights_is_refused(checkpoint):
    edit_weights(checkpoint, lambda w: w[UP][0].fill_(float("inf")))
    target = load_target(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match=f"{UP} holds NaN or infinite"):
        load_drafter({"type": "draft_model", "path": str(checkpoint)}, target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            (["--target", path], [repr(path), "is not a folder", "hub id"])
            for path in ("./nothing", "/no/such/folder", "~/no/such/folder")
        ),
        (["--device", "banana"], ["'banana'", "cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["'cuda:99'", "use cpu"]),
        (["--dtype", "int8"], ["'int8'", "float32"]),
        (["--prompt", "a" * 300], ["prompt 0 has 300 tokens", "context holds 256", "shorten"]),
        (["--prompt", ""], ["prompt 0 is empty", "at least one token"]),
    ],
)
def test_option_that_cannot_work_is_named(checkpoint, options, words):
    assert refused(generate(checkpoint, *options), *words)


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


def test_a_drafter_with_another_tokenizer_is_refused(checkpoint, tmp_path):
    other = save_checkpoint(tmp_path / "other")
    save_tokenizer(other, first=8)
    drafter = f'{{"type": "draft_model", "path": "{other}"}}'
    done = generate(checkpoint, "--drafter", drafter)
    assert refused(done, str(other), "another tokenizer", "97 of 97", "the target's own tokenizer")
