"""Nothing missing, nothing left over, nothing of a wrong shape: the error names the tensor."""

import json
from dataclasses import replace

import pytest
import torch
from random_heads import HEADS, PAIRS, random_head
from safetensors.torch import load_file, save_file

from specdec.checkpoints import HeadCheckpoint, read_head, write_head
from specdec.checkpoints.layouts import _OTHERS

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


def test_the_tables_cover_every_kind_of_head():
    assert {kind for kind, _ in HEADS.values()} == {"medusa", "eagle", "eagle3"}
    assert {layout for _, layout in PAIRS} == {"specdec", *_OTHERS}


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_missing_tensor_is_named(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor in tensors:
        if tensor == "t2d" and layout != "specdec":
            continue  # engines never read it, and it follows from d2t
        rest = {other: value for other, value in tensors.items() if other != tensor}
        if tensor == "embed_tokens.weight" and layout != "specdec":
            (folder / "specdec.json").rename(folder / "hidden")
            save_file(rest, path)
            assert read_head(folder).options["own_embedding"] is False
            (folder / "hidden").rename(folder / "specdec.json")
            with pytest.raises(ValueError, match="own_embedding True"):
                read_head(folder)
            continue
        assert f"lacks the tensor {tensor}" in refusal(folder, path, rest)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_renamed_tensor_is_named_under_both_names(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor in tensors:
        if tensor in ("t2d", "embed_tokens.weight") and layout != "specdec":
            continue
        renamed = {f"{n}_old" if n == tensor else n: value for n, value in tensors.items()}
        message = refusal(folder, path, renamed)
        assert f"lacks the tensor {tensor}" in message
        assert f"{tensor}_old" in message


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_tensor_of_a_wrong_shape_is_named_with_both_shapes(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor, value in tensors.items():
        wrong = torch.cat([value, value[:1]])
        message = refusal(folder, path, {**tensors, tensor: wrong})
        assert tensor in message
        assert f"shape {tuple(wrong.shape)}" in message
        assert str(value.shape[0]) in message


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_tensor_that_is_not_finite_is_named(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor, value in tensors.items():
        if value.is_floating_point():
            for wrong in (float("nan"), float("inf")):
                spoiled = value.clone()
                spoiled.view(-1)[-1] = wrong
                message = refusal(folder, path, {**tensors, tensor: spoiled})
                assert f"{tensor} holds NaN or infinite values" in message


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_quantised_tensor_is_named(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    for tensor, value in tensors.items():
        message = refusal(folder, path, {**tensors, tensor: value.to(torch.int8)})
        assert f"{tensor} is of torch.int8" in message


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_tensor_that_nothing_asks_for_is_named(tmp_path, name, layout):
    folder, path, tensors = written(tmp_path, name, layout)
    message = refusal(folder, path, {**tensors, "extra.weight": torch.ones(2)})
    assert "1 tensors that its config does not ask for: extra.weight" in message


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("fc_norm.0.weight", "EAGLE-3.1"),
        ("layers.0.self_attn.q_norm.weight", "Qwen3"),
        ("mask_hidden", "P-EAGLE"),
        ("layers.1.mlp.up_proj.weight", "several layers"),
        ("midlayer.mlp.up_proj.weight_scale", "quantised"),
    ],
)
def test_a_tensor_of_a_head_that_we_do_not_have_says_so(tmp_path, extra, reason):
    folder, path, tensors = written(tmp_path, "eagle3", "eagle3")
    assert reason in refusal(folder, path, {**tensors, extra: torch.ones(2)})


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_truncated_file_is_said_to_be_truncated(tmp_path, name, layout):
    folder, path, _ = written(tmp_path, name, layout)
    whole = path.read_bytes()
    for keep in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            read_head(folder)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_a_truncated_torch_file_is_said_to_be_truncated(tmp_path, keep):
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
def test_a_torch_file_with_more_than_tensors_is_never_unpickled(tmp_path, content, capsys):
    torch.save(content, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_head(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "specdec.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '"head"', "\udcff"])
def test_a_damaged_description_is_named(tmp_path, file, content):
    folder, _, _ = written(tmp_path, "eagle3", "eagle3")
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=file):
        read_head(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2 but this specdec reads format 1"),
        ({"kind": "hydra"}, "'hydra' but must be one of medusa"),
        ({"options": []}, "options is"),
        ({"options": {"taps": "all"}}, "taps is 'all'"),
        ({"options": {"taps": [-1]}}, r"taps is \[-1\]"),
        ({"options": {"draft_vocab_size": 40.5}}, "draft_vocab_size is 40.5"),
        ({"options": {"backbone": 3}}, "backbone is 3"),
        ({"options": {"backbone": {"head_dim": 0}}}, "backbone.head_dim is 0"),
        ({"tree": [[0, 0]]}, "not its parent"),
        ({"tree": [0, 1]}, "one list of ranks"),
        ({"target": {"name": "x"}}, "target cannot be read"),
        ({"target": "x"}, "target is 'x'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_fact_in_our_own_description_is_named(tmp_path, change, said):
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
def test_what_changed_since_it_was_written_is_refused_until_the_checksum_is_deleted(
    tmp_path, layout, name
):
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
def test_a_value_of_a_wrong_type_is_refused_in_words_or_means_nothing(
    tmp_path, name, layout, value
):
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
def test_maps_of_a_draft_vocabulary_that_disagree_are_named(tmp_path, layout, change, said):
    folder, path, tensors = written(tmp_path, "eagle3", layout)
    change(tensors)
    assert said in refusal(folder, path, tensors)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_the_map_that_no_engine_reads_may_be_missing(tmp_path, layout):
    folder, path, tensors = written(tmp_path, "eagle3", layout)
    marked = tensors.pop("t2d")
    save_file(tensors, path)
    assert torch.equal(read_head(folder).tensors["t2d"], marked)


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
    ],
)
@pytest.mark.parametrize("layout", ["specdec", "eagle3", "speculators"])
def test_a_head_that_could_not_be_read_back_is_not_written(tmp_path, layout, change, said):
    head = random_head("eagle3")
    with pytest.raises(ValueError, match=said):
        write_head(replace(head, **change(head)), tmp_path / "head", layout)
    assert not (tmp_path / "head").exists()


def test_nothing_to_read_is_said_in_words(tmp_path):
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


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_head(random_head("eagle"), "~/head")
    assert (tmp_path / "head" / "specdec.json").exists()
    assert read_head("~/head").kind == "eagle"


def test_a_hub_id_out_of_reach_is_said_to_be_so(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"'org/head' is no folder .* no network"):
        read_head("org/head")


def test_of_a_hub_id_only_what_may_be_a_head_is_downloaded(tmp_path, monkeypatch):
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
def test_what_a_layout_cannot_hold_is_refused_by_name(tmp_path, name, layout, said):
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
def test_an_option_that_a_layout_cannot_hold_is_refused_by_name(
    tmp_path, name, layout, options, said
):
    head = random_head(name)
    changed = replace(head, options={**head.options, **options})
    assert read_head(write_head(changed, tmp_path / "ours")).options == changed.options
    with pytest.raises(ValueError, match=said):
        write_head(changed, tmp_path / "theirs", layout)


def test_a_speculators_head_needs_the_name_of_its_target(tmp_path):
    head = random_head("eagle3")
    for target in (None, replace(head.target, name=None)):
        with pytest.raises(ValueError, match=r"names its target.*--target"):
            write_head(replace(head, target=target), tmp_path / "head", "speculators")


def test_a_backbone_option_that_only_our_own_layout_holds_is_refused(tmp_path):
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
