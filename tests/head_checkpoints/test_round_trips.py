"""What is written comes back, bit for bit and option for option, from every layout."""

import json
from dataclasses import replace

import pytest
import torch
from random_heads import PAIRS, ROPE, random_head, same_tensors, target
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from specdec.checkpoints import (
    HeadCheckpoint,
    check_target,
    identify_target,
    read_head,
    write_head,
)
from specdec.drafters.heads import build_head, fill_head, load_head
from specdec.registry import strategy
from specdec.targets.hf import HFTarget

TREE = [[0], [1], [0, 0]]
TRAINING = {"loss": 1.25, "data": ["gsm8k"], "tokens": 1000}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_head_comes_back_as_it_was_written(tmp_path, name, layout, dtype):
    written = random_head(name, dtype, TREE, TRAINING)
    folder = write_head(written, tmp_path / "head", layout)
    found = read_head(folder)
    assert same_tensors(found.tensors, written.tensors)
    assert (found.kind, found.options, found.tree) == (written.kind, written.options, TREE)
    assert (found.target, found.training, found.layout) == (written.target, TRAINING, layout)
    head, _ = load_head(strategy(written.kind), target(), str(folder), dtype=dtype)
    assert same_tensors(head.state_dict(), written.tensors)
    if layout == "specdec":
        return
    (folder / "specdec.json").unlink()  # the layout alone makes the same head
    found = read_head(folder)
    head = build_head(found.kind, found.options, target())
    fill_head(head, found.tensors, str(folder))
    assert head.options.model_dump(exclude_none=True) == written.options
    assert same_tensors(found.tensors, written.tensors)
    assert (found.target.weights, found.target.hidden_size) == (None, 32)
    assert found.tree == (TREE if layout == "medusa" else None)
    check_target(found, identify_target(target()))


def test_tensors_may_share_memory(tmp_path):
    written = random_head("medusa")
    first = written.tensors["blocks.0.0.linear.weight"]
    shared = {**written.tensors, "blocks.0.1.linear.weight": first}
    folder = write_head(replace(written, tensors=shared), tmp_path, "medusa")
    assert torch.equal(read_head(folder).tensors["blocks.0.1.linear.weight"], first)


@pytest.mark.parametrize("layout", ["eagle", "eagle3", "speculators"])
def test_rotary_scaling_reaches_transformers_by_either_spelling(tmp_path, layout):
    written = random_head("eagle" if layout == "eagle" else "eagle3")
    backbone = {**written.options["backbone"], "rope_parameters": ROPE}
    written = replace(written, options={**written.options, "backbone": backbone})
    folder = write_head(written, tmp_path, layout)
    config = json.loads((folder / "config.json").read_text())
    config = config.get("transformer_layer_config", config)
    for dropped in (["rope_parameters"], ["rope_theta", "rope_scaling"], []):
        kept = {key: value for key, value in config.items() if key not in dropped}
        assert LlamaConfig(**kept).rope_parameters == ROPE
        for other in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps"):
            assert getattr(LlamaConfig(**kept), other) == backbone[other]


def test_crash_while_writing_keeps_old_files(tmp_path, monkeypatch):
    written = random_head("eagle", training={"step": 1})
    write_head(written, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*folders):
        raise OSError("the disk is gone")

    monkeypatch.setattr("specdec.common.files._swap", crash)
    with pytest.raises(OSError, match="the disk is gone"):
        write_head(replace(written, training={"step": 2}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_head_overwrites_itself_but_no_other(tmp_path):
    write_head(random_head("medusa"), tmp_path)
    write_head(random_head("medusa", training={"step": 2}), tmp_path)
    assert read_head(tmp_path).training == {"step": 2}
    with pytest.raises(ValueError, match=r"holds model\.safetensors of another checkpoint"):
        write_head(random_head("medusa"), tmp_path, "medusa")


@pytest.mark.parametrize("layout", ["specdec", "eagle3", "speculators"])
def test_tensors_moved_beside_another_description_are_told_apart(tmp_path, layout):
    folder = write_head(random_head("eagle3"), tmp_path / "one", layout)
    other = write_head(random_head("eagle"), tmp_path / "two")
    save_file(load_file(other / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks the tensor"):
        read_head(folder)


@pytest.mark.parametrize(
    ("name", "layout", "key", "value", "said"),
    [
        ("eagle", "eagle", "rms_norm_eps", 0.5, "backbone.rms_norm_eps 1e-06"),
        ("eagle", "eagle", "rope_theta", 7.0, "contradicts itself"),
        ("eagle3", "eagle3", "norm_output", True, "norm_output False"),
        ("eagle3", "eagle3", "max_position_embeddings", 7, "max_position_embeddings 256"),
        ("eagle3", "eagle3", "eagle_aux_hidden_state_layer_ids", None, r"taps \[1, 4, 6\]"),
        ("eagle3", "speculators", "norm_before_residual", True, "norm_before_residual False"),
        ("medusa", "medusa", "medusa_choices", [[0]], r"tree \[\[0\], \[1\], \[0, 0\]\]"),
    ],
)
def test_a_description_that_contradicts_the_config_is_refused(
    tmp_path, name, layout, key, value, said
):
    folder = write_head(random_head(name, tree=TREE), tmp_path, layout)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    if value is None:
        config.pop("eagle_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        read_head(folder)


def test_a_target_need_not_name_its_head_dim(tmp_path):
    """Rows of queries and keys, 32 and 16, would make it 16."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=61, num_hidden_layers=8, intermediate_size=48, **sizes)
    trained_for = HFTarget(Qwen2ForCausalLM(config).eval())
    head = build_head("eagle3", {}, trained_for)
    tensors = dict(head.state_dict())
    written = HeadCheckpoint("eagle3", {}, tensors, target=identify_target(trained_for))
    assert same_tensors(read_head(write_head(written, tmp_path)).tensors, tensors)
