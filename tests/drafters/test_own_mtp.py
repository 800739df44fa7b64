"""MTP layers that come with the target: read from its checkpoint, and nothing else of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_heads import tiny_head
from tiny_models import tiny_llama

from specdec import generate, generate_baseline, load_drafter, load_target
from specdec.checkpoints import HeadCheckpoint, folder, identify_target, read_head, write_head
from specdec.checkpoints.find import find_drafter
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11]]
STYLES = {"deepseek-mtp": {}, "deepseek-mtp, modules": {"num_modules": 2}, "qwen-mtp": {}}


def ship(place, style, options, is_sharded=False):
    """Write a tiny target whose checkpoint holds its MTP layers; returns these in our layout."""
    model = tiny_llama()
    target = HFTarget(model)
    head = tiny_head("mtp", target, **options)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    whole = head.options.model_dump(exclude_none=True)
    alone = HeadCheckpoint("mtp", whole, tensors, target=identify_target(target))
    ours = write_head(alone, place / "ours")
    theirs = write_head(alone, place / "theirs", style.split(",")[0])
    extra = load_file(theirs / "model.safetensors")
    model.save_pretrained(place / "target")
    config = json.loads((place / "target/config.json").read_text())
    config |= {"num_nextn_predict_layers": options.get("num_modules", 1)}
    (place / "target/config.json").write_text(json.dumps(config))
    weights = place / "target/model.safetensors"
    stored = load_file(weights)
    if "deepseek" in style:
        ends = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
        for copy, end in ends.items():
            extra[f"model.layers.2.{copy}.weight"] = stored[f"{end}.weight"].clone()
    if not is_sharded:
        save_file({**stored, **extra}, weights, {"format": "pt"})
        return ours, place / "target"
    weights.unlink()
    shards = {"model-1.safetensors": stored, "model-2.safetensors": extra}
    index = {name: shard for shard, each in shards.items() for name in each}
    for shard, each in shards.items():
        save_file(each, place / "target" / shard, {"format": "pt"})
    file = place / "target/model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return ours, place / "target"


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_target_drafts_with_its_own_layer(tmp_path, style, is_sharded, monkeypatch):
    ours, place = ship(tmp_path, style, STYLES[style], is_sharded)
    target = load_target(str(place))

    def refused(path):
        raise AssertionError(f"{path} is read whole")

    drafters = [load_drafter({"type": "mtp", "path": str(ours)}, target)]
    monkeypatch.setattr(folder, "load_file", refused)
    drafters += [load_drafter(each, target) for each in ("mtp", {"type": "mtp", "path": place})]
    expected = drafters[0].head.state_dict()
    plain = [result.tokens for result in generate_baseline(target, PROMPTS, max_new_tokens=24)]
    for drafter in drafters:
        found = drafter.head.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert drafter.head.num_layers == STYLES[style].get("num_modules", 1)
        results = generate(target, drafter, PROMPTS, max_new_tokens=24)
        assert [result.tokens for result in results] == plain
        assert sum(result.stats.num_accepted for result in results)
    assert find_drafter({"type": "mtp", "path": str(place)})[1].layout == style.split(",")[0]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_hub_gives_no_more_than_the_layer(tmp_path, is_sharded, monkeypatch):
    ours, place = ship(tmp_path, "deepseek-mtp", {}, is_sharded)
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision, *allow_patterns))
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = read_head("org/target", revision="v1")
    assert found.tensors.keys() == read_head(ours).tensors.keys()
    file = "model-2.safetensors" if is_sharded else "model.safetensors"
    assert asked[1:] == [("org/target", "v1", file)]


def test_damaged_shard_is_named(tmp_path):
    _, place = ship(tmp_path, "deepseek-mtp", {}, is_sharded=True)
    (place / "model-2.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model-2.safetensors' cannot be read"):
        read_head(place)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_norms_of_qwen_scale_by_one_more(tmp_path, model_type):
    ours, place = ship(tmp_path, "qwen-mtp", {})
    file, weights = place / "config.json", place / "model.safetensors"
    file.write_text(
        json.dumps({"text_config": json.loads(file.read_text())}).replace(
            '"model_type": "llama"', f'"model_type": "{model_type}"'
        )
    )
    stored = load_file(weights)
    less = {n: t - 1 if n.startswith("mtp.") and t.ndim == 1 else t for n, t in stored.items()}
    save_file(less, weights, {"format": "pt"})
    found, expected = read_head(place).tensors, read_head(ours).tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_target_without_a_layer_says_what_to_do(tmp_path):
    model = tiny_llama()
    for target in (HFTarget(model), None):
        if target is None:
            model.save_pretrained(tmp_path)
            target = load_target(str(tmp_path))
        with pytest.raises(
            ValueError, match=r"ships no MTP layer; train one .* or give its folder"
        ):
            load_drafter("mtp", target)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", r"latent attention \(MLA\)"),
        ("model.layers.2.mlp.experts.0.up_proj.weight", "a mixture of experts"),
        ("model.layers.2.self_attn.q_proj.weight", r"q_proj.weight has shape \(64, 32\)"),
        ("model.layers.2.extra.weight", "does not ask for: model.layers.2.extra.weight"),
    ],
)
def test_layer_that_cannot_be_held_is_named(tmp_path, name, words):
    _, place = ship(tmp_path, "deepseek-mtp", {})
    weights = place / "model.safetensors"
    save_file({**load_file(weights), name: torch.ones(64, 32)}, weights, {"format": "pt"})
    target = load_target(str(place))
    with pytest.raises(ValueError, match=words):
        load_drafter("mtp", target)


def test_other_tensors_of_a_target_are_still_refused(tmp_path):
    _, place = ship(tmp_path, "deepseek-mtp", {})
    weights = place / "model.safetensors"
    save_file({**load_file(weights), "model.layers.3.up.weight": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match=r"unexpected tensors .*model\.layers\.3\.up\.weight"):
        load_target(str(place))


def test_chain_longer_than_the_modules_is_refused(tmp_path):
    _, place = ship(tmp_path, "deepseek-mtp", {"num_modules": 2})
    target = load_target(str(place))
    assert load_drafter({"type": "mtp", "depth": 5}, target).draft_shape.depth == 2
    with pytest.raises(ValueError, match="the tree has 3 levels but the head drafts 2"):
        load_drafter({"type": "mtp", "choices": [[0], [0, 0], [0, 0, 0]]}, target)
