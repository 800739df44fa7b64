"""Nothing missing, nothing left over, nothing of a wrong shape: the error names the tensor."""

import json
import re
from dataclasses import replace

import pytest
import torch
from random_heads import HEADS, PAIRS, random_head, same_tensors
from safetensors.torch import load_file, save_file

from specdec.checkpoints import LAYOUTS, read_head, write_head
from specdec.checkpoints.folder import size_on_disk

WEIGHTS = {"medusa": "medusa_lm_head.safetensors"}
# Beside the layers that a target ships lie the target's own tensors.
PLACES = {"qwen-mtp": "mtp.", "deepseek-mtp": "model.layers.8."}


def written(tmp_path, name, layout):
    """The folder, its file of tensors, and the tensors."""
    folder = write_head(random_head(name), tmp_path, layout)
    path = folder / WEIGHTS.get(layout, "model.safetensors")
    return folder, path, load_file(path)


def refusal(folder, path, tensors):
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_head(folder)
    return str(caught.value)


def test_tables_cover_all_kinds_and_layouts():
    kinds = {"medusa", "eagle", "eagle3", "mixture_of_attentions", "mtp", "peagle", "dflash"}
    assert {kind for kind, _ in HEADS.values()} == kinds
    assert {layout for _, layout in PAIRS} == set(LAYOUTS)


def spoiled(value, wrong):
    """A copy whose last entry is wrong."""
    value = value.clone()
    value.view(-1)[-1] = wrong
    return value


def damages(name, tensors):
    """(tensors with one of them damaged, words of its refusal) of a file."""
    value, others = tensors[name], {n: t for n, t in tensors.items() if n != name}
    longer = torch.cat([value, value[:1]])
    yield others, [f"lacks the tensor {name}"]
    yield {**others, f"{name}_old": value}, [f"lacks the tensor {name}", f"{name}_old"]
    yield {**others, name: longer}, [name, f"shape {tuple(longer.shape)}", str(value.shape[0])]
    yield {**others, name: value.to(torch.int8)}, [f"{name} is of torch.int8"]
    if value.is_floating_point():
        for wrong in (float("nan"), float("inf")):
            yield {**others, name: spoiled(value, wrong)}, [f"{name} holds NaN or infinite"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_damaged_tensor_is_named(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor in tensors:
        cases = list(damages(tensor, tensors))
        if tensor in ("t2d", "embed_tokens.weight") and layout != "specdec":
            cases = cases[2:]  # these may be missing, see below
        for given, words in cases:
            message = refusal(folder, path, given)
            assert all(word in message for word in words), message
    extra = f"{PLACES.get(layout, '')}extra.weight"
    message = refusal(folder, path, {**tensors, extra: torch.ones(2)})
    assert f"1 tensors that its config does not ask for: {extra}" in message
    whole = path.read_bytes()
    for keep in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            read_head(folder)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_tensors_that_may_be_missing(tmp_path, layout):
    folder, path, tensors = written(tmp_path / "reduced", "eagle3", layout)
    marked = tensors.pop("t2d")  # engines never read it, and it follows from d2t
    save_file(tensors, path)
    assert torch.equal(read_head(folder).tensors["t2d"], marked)
    folder, path, tensors = written(tmp_path / "whole", "eagle3-whole", layout)
    del tensors["embed_tokens.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="own_embedding True"):
        read_head(folder)
    (folder / "specdec.json").unlink()
    assert read_head(folder).options["own_embedding"] is False


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("fc_norm.0.weight", "fc_norm=true"),
        ("mask_hidden", "P-EAGLE"),
        ("layers.1.mlp.up_proj.weight", "several layers"),
        ("midlayer.mlp.up_proj.weight_scale", "quantized"),
    ],
)
def test_foreign_tensor_says_whose_it_is(tmp_path, extra, reason):
    folder, path, tensors = written(tmp_path, "eagle3", "eagle3")
    assert reason in refusal(folder, path, {**tensors, extra: torch.ones(2)})


def in_shards(folder):
    """Split a head's file in two; returns the index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    placed = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in names:
        own = {name: tensors[name] for name, at in placed.items() if at == shard}
        save_file(own, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_head_in_shards_is_read_whole(tmp_path):
    folder, _, _ = written(tmp_path, "eagle3", "speculators")
    whole, size = read_head(folder), size_on_disk(folder)
    in_shards(folder)
    found = read_head(folder)
    assert same_tensors(found.tensors, whole.tensors)
    assert found.options == whole.options
    assert size_on_disk(folder) > size  # both shards and the index
    with pytest.raises(ValueError, match=r"holds model\.safetensors\.index\.json of another"):
        write_head(random_head("eagle3"), folder, "speculators")


def without_a_shard(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_another_shard(folder, index):
    save_file({"extra": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")


def with_a_tensor_elsewhere(folder, index):
    index["weight_map"]["d2t"] = "model-00002-of-00002.safetensors"


def with_a_shard_outside(folder, index):
    index["weight_map"]["d2t"] = "../model.safetensors"


def with_a_tensor_left_out(folder, index):
    del index["weight_map"]["d2t"]


def with_no_map(folder, index):
    del index["weight_map"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_shard, r"model-00002-of-00002\.safetensors' is missing"),
        (with_another_shard, r"model-00003-of-00003\.safetensors' is not one of the shards"),
        (with_a_shard_outside, r"\.\./model\.safetensors' is missing"),
        (with_a_tensor_elsewhere, r"model-00001.* holds the tensor d2t, against"),
        (with_a_tensor_left_out, "holds the tensor d2t, against"),
        (with_no_map, r"index\.json'? .*weight_map is missing"),
    ],
)
def test_shards_are_those_of_the_index(tmp_path, change, said):
    folder, _, _ = written(tmp_path, "eagle3", "eagle3")
    index = in_shards(folder)
    change(folder, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        read_head(folder)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_truncated_torch_file_is_refused(tmp_path, keep):
    folder, path, tensors = written(tmp_path, "eagle", "eagle")
    path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    read_head(folder)
    (folder / "pytorch_model.bin").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.* cannot be read .* truncated"):
        read_head(folder)


class Payload:
    """Whoever unpickles it runs code."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [{"fc.weight": Payload()}, [1, 2], {"step": 3}])
def test_torch_file_with_objects_is_never_unpickled(tmp_path, content, capsys):
    torch.save(content, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_head(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "specdec.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '"head"', "\udcff"])
def test_damaged_description_is_named(tmp_path, file, content):
    folder, _, _ = written(tmp_path, "eagle3", "eagle3")
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=file):
        read_head(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format is 2 but must be one of 1"),
        ({"kind": "hydra"}, "'hydra' but must be one of dflash"),
        ({"options": []}, "options is"),
        ({"options": {"taps": "all"}}, "taps is 'all'"),
        ({"options": {"taps": [-1]}}, "taps.0 is -1"),
        ({"options": {"draft_vocab_size": 40.5}}, "draft_vocab_size is 40.5"),
        ({"options": {"backbone": 3}}, "backbone is 3"),
        ({"options": {"backbone": {"head_dim": 0}}}, "backbone.head_dim is 0"),
        ({"tree": [[0, 0]]}, "not its parent"),
        ({"tree": [0, 1]}, "tree.0 is 0 but must be a list"),
        ({"target": {"name": "x"}}, "target.hidden_size is missing"),
        ({"target": "x"}, "target is 'x'"),
        (
            {"target": {"name": "x", "hidden_size": 3, "size": 1}},
            "target.size does not exist; known: facts, hidden",
        ),
        ({"surprise": 1}, "surprise does not exist"),
    ],
)
def test_wrong_fact_in_description_is_named(tmp_path, change, said):
    folder, _, _ = written(tmp_path, "eagle3", "specdec")
    edit_json(folder, lambda content: content.update(change))
    with pytest.raises(ValueError, match=said):
        read_head(folder)


def edit_json(folder, change):
    content = json.loads((folder / "specdec.json").read_text())
    change(content)
    (folder / "specdec.json").write_text(json.dumps(content))


def edited(change):
    return lambda folder, tensors: edit_json(folder, change)


def swapped(folder, tensors):
    one, other = (f"midlayer.self_attn.{name}_proj.weight" for name in "kv")
    tensors[one], tensors[other] = tensors[other], tensors[one]


def with_a_bit_flipped(folder, tensors):
    tensors["fc.weight"].view(torch.int32).view(-1)[3] ^= 1


CHANGED = {
    "a number": edited(lambda known: known["options"]["backbone"].update(rms_norm_eps=1e-3)),
    "the target": edited(lambda known: known.update(target=None)),
    "the checksum": edited(lambda known: known.update(sha256=None)),
    "two tensors": swapped,
    "a bit": with_a_bit_flipped,
}


@pytest.mark.parametrize("layout", ["specdec", "eagle3"])
@pytest.mark.parametrize("name", CHANGED)
def test_change_is_refused_until_checksum_is_deleted(tmp_path, layout, name):
    folder = write_head(random_head("eagle3"), tmp_path, layout)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = {n: n.replace("layers.0.", "midlayer.") for n in tensors}
    renamed = {names[n]: t for n, t in tensors.items()}
    CHANGED[name](folder, renamed)
    save_file({n: renamed[names[n]] for n in tensors}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}.*(have changed since|delete specdec.json)"):
        read_head(folder)
    edit_json(folder, lambda known: known.pop("sha256"))
    if layout == "specdec":
        read_head(folder)


def keys_of(content, before=()):
    """Paths of all keys, those of inner objects too."""
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), {layout: (n, layout) for n, layout in PAIRS}.values())
@pytest.mark.parametrize("value", [[], {"a": 1}, "x", -1])
def test_value_of_wrong_type_is_refused_in_words(tmp_path, name, layout, value):
    folder, _, _ = written(tmp_path, name, layout)
    messages = []
    for path in (folder / "config.json", folder / "specdec.json"):
        whole = path.read_text() if path.exists() else "{}"
        for keys in keys_of(json.loads(whole)):
            content = inner = json.loads(whole)
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value
            path.write_text(json.dumps(content))
            try:
                read_head(folder)
            except ValueError as error:
                messages.append(str(error))
            path.write_text(whole)
    assert len(messages) > 5
    assert all(str(folder) in message for message in messages)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["d2t"].__setitem__(-1, 90), "d2t leads to the target ids"),
        (lambda t: t["d2t"].__setitem__(0, -1), "must hold offsets"),
        (lambda t: t["d2t"].__setitem__(1, int(t["d2t"][0]) - 1), "a target id twice"),
        (lambda t: t["t2d"].logical_not_(), "t2d marks other target ids"),
    ],
)
@pytest.mark.parametrize("layout", ["specdec", "eagle3", "speculators"])
def test_maps_that_disagree_are_named(tmp_path, layout, change, said):
    folder, path, tensors = written(tmp_path, "eagle3", layout)
    change(tensors)
    assert said in refusal(folder, path, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids.__setitem__(-1, 61), "holds the target ids .* to 61, but there are 61"),
        (lambda ids: ids.__setitem__(0, -1), "holds the target ids -1 to"),
        (lambda ids: ids.__setitem__(1, int(ids[0])), "a target id twice"),
    ],
)
@pytest.mark.parametrize("layout", ["specdec", "vllm-medusa"])
def test_map_of_medusa_that_cannot_be_is_named(tmp_path, layout, change, said):
    folder, path, tensors = written(tmp_path, "medusa-reduced", layout)
    change(tensors["draft_ids" if layout == "specdec" else "token_map"])
    assert re.search(said, refusal(folder, path, tensors))


def test_folder_without_head_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_head(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no draft head: none of"):
        read_head(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    with pytest.raises(FileNotFoundError, match="a model of 32 layers"):
        read_head(tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"first tensors are model\.norm\.weight"):
        read_head(tmp_path)


def test_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_head(random_head("eagle"), "~/head")
    assert (tmp_path / "head" / "specdec.json").exists()
    assert read_head("~/head").kind == "eagle"


def test_only_heads_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision=None, allow_patterns=None):
        asked.append((revision, tuple(allow_patterns)))
        if name == "org/nothing":
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    write_head(random_head("eagle3"), tmp_path, "eagle3")
    assert read_head("org/head", revision="v1").kind == "eagle3"
    assert [revision for revision, _ in asked] == ["v1", "v1"]
    assert "model.safetensors" in asked[1][1]
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    with pytest.raises(ValueError, match=r"a model of 32 layers, .* were not downloaded"):
        read_head("org/model")
    assert len(asked) == 3
    with pytest.raises(FileNotFoundError, match=r"'org/nothing' is no folder .* no network"):
        read_head("org/nothing")


def with_options(**options):
    return lambda head: {"options": {**head.options, **options}}


def with_biased_mlp(head):
    sizes = {"gate": 64, "up": 64, "down": 32}.items()
    biases = {f"layers.0.mlp.{name}_proj.bias": torch.ones(size) for name, size in sizes}
    backbone = {**head.options["backbone"], "mlp_bias": True}
    return {**with_options(backbone=backbone)(head), "tensors": {**head.tensors, **biases}}


ANY = [
    (lambda head: {"kind": "hydra"}, "kind is 'hydra'"),
    (with_options(norm_before_fc=True), r"input_norm\.weight"),
    (with_options(draft_vocab_size=41), "but must have"),
    (lambda head: {"tensors": {**head.tensors, "fc.weight": torch.ones(2)}}, "fc.weight has shape"),
    (lambda head: {"tensors": {**head.tensors, "extra": torch.ones(2)}}, "extra"),
    (lambda head: {"training": {"loss": float("nan")}}, "JSON"),
    (lambda head: {"training": {"when": object()}}, "JSON"),
    (lambda head: {"tree": [[1, 1]]}, "not its parent"),
    (lambda head: {"tree": [0, 1]}, "tree.0 is 0 but must be a list"),
]
UNCHANGED = dict


def without_backbone(head):
    return {"options": {key: value for key, value in head.options.items() if key != "backbone"}}


# Head, layout, its change, the refusal; our own layout holds what is changed here.
HELD_BY_OURS = [
    ("eagle3-normed", "eagle3", UNCHANGED, "cannot hold norm_before_residual=true"),
    ("eagle3-deep", "eagle3", UNCHANGED, "cannot hold num_layers=3.*speculators"),
    ("medusa-shared", "vllm-medusa", UNCHANGED, "own_vocab_head=false"),
    ("medusa-reduced", "medusa", UNCHANGED, "cannot hold a reduced vocab.*vllm-medusa"),
    ("eagle", "eagle3", UNCHANGED, "holds heads of the kind 'eagle3', not 'eagle'"),
    ("eagle3", "medusa", UNCHANGED, "holds heads of the kind 'medusa', not 'eagle3'"),
    ("eagle3", "eagle3", with_options(taps=[4, 4, 6]), "a layer once"),
    ("eagle3", "speculators", with_options(taps=[4, 1, 6]), "ascending order"),
    ("eagle3", "eagle3", with_options(taps=[2, 4, 8]), "the tap 8 of a target with 8 layers"),
    ("medusa", "medusa", with_options(tap=7), "the tap 7"),
    ("medusa", "vllm-medusa", with_options(tap=7), "the tap 7"),
    *(
        (name, layout, without_backbone, "num_attention_heads.*--target")
        for name, layout in (("eagle", "eagle"), ("eagle3", "eagle3"), ("eagle3", "speculators"))
    ),
    ("eagle", "eagle", with_biased_mlp, r"cannot hold the option backbone\.mlp_bias"),
    ("eagle3", "speculators", lambda head: {"target": None}, "names its target.*--target"),
    (
        *("eagle3", "speculators"),
        lambda head: {"target": replace(head.target, name=None)},
        "names its target.*--target",
    ),
]
REFUSED = [
    ("medusa", "hydra", UNCHANGED, "must be one of specdec"),
    *(("eagle3", layout, *case) for layout in ("specdec", "eagle3", "speculators") for case in ANY),
    *HELD_BY_OURS,
]


@pytest.mark.parametrize(("name", "layout", "change", "said"), REFUSED)
def test_what_no_layout_can_hold_is_not_written(tmp_path, name, layout, change, said):
    head = random_head(name)
    head = replace(head, **change(head) if change is not UNCHANGED else {})
    with pytest.raises(ValueError, match=said):
        write_head(head, tmp_path / "theirs", layout)
    assert not (tmp_path / "theirs").exists()
    if (name, layout, change, said) in HELD_BY_OURS:
        assert read_head(write_head(head, tmp_path / "ours")).options == head.options
