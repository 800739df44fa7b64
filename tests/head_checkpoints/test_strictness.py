"""Nothing missing, nothing left over, nothing of a wrong shape: the error names the tensor."""

import json
from dataclasses import replace

import pytest
import torch
from random_heads import HEADS, PAIRS, random_head
from safetensors.torch import load_file, save_file

from specdec.checkpoints import LAYOUTS, HeadCheckpoint, read_head, write_head

WEIGHTS = {"medusa": "medusa_lm_head.safetensors"}


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
    assert {kind for kind, _ in HEADS.values()} == {"medusa", "eagle", "eagle3"}
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
    message = refusal(folder, path, {**tensors, "extra.weight": torch.ones(2)})
    assert "1 tensors that its config does not ask for: extra.weight" in message
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
        ("fc_norm.0.weight", "EAGLE-3.1"),
        ("layers.0.self_attn.q_norm.weight", "Qwen3"),
        ("mask_hidden", "P-EAGLE"),
        ("layers.1.mlp.up_proj.weight", "several layers"),
        ("midlayer.mlp.up_proj.weight_scale", "quantized"),
    ],
)
def test_foreign_tensor_says_whose_it_is(tmp_path, extra, reason):
    folder, path, tensors = written(tmp_path, "eagle3", "eagle3")
    assert reason in refusal(folder, path, {**tensors, extra: torch.ones(2)})


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
        ({"kind": "hydra"}, "'hydra' but must be one of eagle"),
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
    content = json.loads((folder / "specdec.json").read_text()) | change
    (folder / "specdec.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read_head(folder)


def changed_json(*keys, value):
    def change(folder, tensors):
        content = inner = json.loads((folder / "specdec.json").read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "specdec.json").write_text(json.dumps(content))

    return change


def swapped(folder, tensors):
    one, other = (f"midlayer.self_attn.{name}_proj.weight" for name in "kv")
    tensors[one], tensors[other] = tensors[other], tensors[one]


def with_a_bit_flipped(folder, tensors):
    tensors["fc.weight"].view(torch.int32).view(-1)[3] ^= 1


CHANGED = {
    "a number": changed_json("options", "backbone", "rms_norm_eps", value=1e-3),
    "the target": changed_json("target", value=None),
    "the checksum": changed_json("sha256", value=None),
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
    content = json.loads((folder / "specdec.json").read_text())
    del content["sha256"]
    (folder / "specdec.json").write_text(json.dumps(content))
    if layout == "specdec":
        read_head(folder)


def keys_of(content, before=()):
    """Paths of all keys, those of inner objects too."""
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


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
        (lambda c: {"kind": "hydra"}, "kind is 'hydra'"),
        (lambda c: {"options": {**c.options, "norm_before_fc": True}}, r"input_norm\.weight"),
        (lambda c: {"options": {**c.options, "draft_vocab_size": 41}}, "but must have"),
        (lambda c: {"tensors": {**c.tensors, "fc.weight": torch.ones(2)}}, "fc.weight has shape"),
        (lambda c: {"tensors": {**c.tensors, "extra": torch.ones(2)}}, "extra"),
        (lambda c: {"training": {"loss": float("nan")}}, "JSON"),
        (lambda c: {"training": {"when": object()}}, "JSON"),
        (lambda c: {"tree": [[1, 1]]}, "not its parent"),
        (lambda c: {"tree": [0, 1]}, "tree.0 is 0 but must be a list"),
    ],
)
@pytest.mark.parametrize("layout", ["specdec", "eagle3", "speculators"])
def test_unreadable_head_is_not_written(tmp_path, layout, change, said):
    head = random_head("eagle3")
    with pytest.raises(ValueError, match=said):
        write_head(replace(head, **change(head)), tmp_path / "head", layout)
    assert not (tmp_path / "head").exists()


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


def test_unreachable_hub_id_is_refused(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"'org/head' is no folder .* no network"):
        read_head("org/head")


def test_only_heads_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision=None, allow_patterns=None):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    write_head(random_head("eagle3"), tmp_path, "eagle3")
    assert read_head("org/head", revision="v1").kind == "eagle3"
    assert [revision for _, revision, _ in asked] == ["v1", "v1"]
    assert "model.safetensors" in asked[1][2]
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    with pytest.raises(ValueError, match=r"a model of 32 layers, .* were not downloaded"):
        read_head("org/model")
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("eagle3-normed", "eagle3", "cannot hold norm_before_residual=true"),
        ("medusa-shared", "vllm-medusa", "own_vocab_head=false"),
        ("eagle", "eagle3", "holds heads of the kind 'eagle3', not 'eagle'"),
        ("eagle3", "medusa", "holds heads of the kind 'medusa', not 'eagle3'"),
        ("medusa", "hydra", "must be one of specdec"),
    ],
)
def test_layout_refuses_what_it_cannot_hold(tmp_path, name, layout, said):
    with pytest.raises(ValueError, match=said):
        write_head(random_head(name), tmp_path / "head", layout)
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("name", "layout", "options", "said"),
    [
        ("eagle3", "eagle3", {"taps": [4, 4, 6]}, "a layer once"),
        ("eagle3", "speculators", {"taps": [4, 1, 6]}, "ascending order"),
        ("eagle3", "eagle3", {"taps": [2, 4, 8]}, "the tap 8 of a target with 8 layers"),
        ("medusa", "medusa", {"tap": 7}, "the tap 7"),
        ("medusa", "vllm-medusa", {"tap": 7}, "the tap 7"),
    ],
)
def test_layout_refuses_option_it_cannot_hold(tmp_path, name, layout, options, said):
    head = random_head(name)
    changed = replace(head, options={**head.options, **options})
    assert read_head(write_head(changed, tmp_path / "ours")).options == changed.options
    with pytest.raises(ValueError, match=said):
        write_head(changed, tmp_path / "theirs", layout)


def test_speculators_needs_name_of_target(tmp_path):
    head = random_head("eagle3")
    for target in (None, replace(head.target, name=None)):
        with pytest.raises(ValueError, match=r"names its target.*--target"):
            write_head(replace(head, target=target), tmp_path / "head", "speculators")


def test_biased_mlp_fits_our_layout_only(tmp_path):
    head = random_head("eagle")
    options = {**head.options, "backbone": {**head.options["backbone"], "mlp_bias": True}}
    biases = {
        f"layers.0.mlp.{name}_proj.bias": torch.ones(size)
        for name, size in (("gate", 64), ("up", 64), ("down", 32))
    }
    changed = HeadCheckpoint("eagle", options, {**head.tensors, **biases}, target=head.target)
    assert read_head(write_head(changed, tmp_path / "ours")).options == options
    with pytest.raises(ValueError, match=r"cannot hold the option backbone\.mlp_bias"):
        write_head(changed, tmp_path / "theirs", "eagle")
