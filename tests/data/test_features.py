"""Extraction: what is refused, what a killed run leaves, and that the index says what there is."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from checkpoints import save_tokenizer
from json_schema import violations
from tiny_features import contents, extraction, make_store, random_rows, write_folder
from tiny_models import tiny_llama, tiny_target
from tiny_training import write_rows
from typer.testing import CliRunner

from specdec.cli import app
from specdec.data import features
from specdec.data import features as feature_plan
from specdec.data.feature_store import Counts, FeatureLayout, FeatureStore
from specdec.data.features import refuse_what_does_not_fit
from specdec.targets.load import load_target

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "features.schema.json").read_text())


class Killed(BaseException):
    pass


@pytest.fixture
def small_files(monkeypatch):
    """Files of a few rows."""
    monkeypatch.setattr(feature_plan, "_MIB", 20_000)


def test_the_index_describes_the_store_and_follows_the_schema(tmp_path, small_files):
    store = make_store(tmp_path, tiny_target(), shard_mib=1)
    index = json.loads((tmp_path / "store" / "features.json").read_text())
    assert violations(index, SCHEMA) == []
    shards = index["splits"]["train"]["shards"]
    assert len(shards) > 2
    assert sum(shard["rows"] for shard in shards) == index["splits"]["train"]["rows"] == 9
    files = {shard["file"]: shard["bytes"] for shard in shards}
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "store").iterdir()}
    assert on_disk == {**files, "features.json": on_disk["features.json"]}
    assert store.index.provenance["dtype"] == "float32"
    store.verify()


def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path, small_files, monkeypatch):
    path = write_folder(tmp_path / "answers", random_rows(), random_rows(3, seed=1))
    target = tiny_target()
    write = features.write_durably
    extraction(path, target).run(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    num_writes = 2 * (len(whole) - 1) + 2  # an index after each file, one before and one after all
    for last in range(num_writes):
        out = tmp_path / f"killed-{last}"
        writes = []

        def killed(path, content, last=last, writes=writes):
            if len(writes) == last:
                path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
                raise Killed
            writes.append(path)
            write(path, content)

        run = extraction(path, target)
        run._index.provenance = json.loads(whole["features.json"])["provenance"]
        monkeypatch.setattr(features, "write_durably", killed)
        with pytest.raises(Killed):
            run.run(out)
        monkeypatch.setattr(features, "write_durably", write)
        if last:
            with pytest.raises(ValueError, match="not finished"):
                FeatureStore.open(out)
        run.run(out)
        assert contents(out) == whole


def test_a_resumed_run_does_not_repeat_finished_files(tmp_path, small_files, monkeypatch):
    path = write_folder(tmp_path / "answers", random_rows())
    target = tiny_target()
    extraction(path, target).run(tmp_path / "store")
    (tmp_path / "store" / "train-00001.safetensors").unlink()
    read = []
    fill = features.fill_shard

    def counted(content, *arguments):
        read.append(len(content.rows))
        return fill(content, *arguments)

    monkeypatch.setattr(features, "fill_shard", counted)
    done = []
    extraction(path, target).run(tmp_path / "store", lambda *shown: done.append(shown[:2]))
    assert len(read) == 1
    assert done[-1][0] == done[-1][1] == sum(len(row["tokens"]) for row in random_rows())
    FeatureStore.open(tmp_path / "store").verify()


def test_a_disk_that_fills_up_midway_loses_nothing(tmp_path, small_files):
    path = write_folder(tmp_path / "answers", random_rows())
    target = tiny_target()
    whole = make_store(tmp_path, target)
    sizes = [shard.bytes for shard in whole.index.splits["train"].shards]
    assert max(sizes[1:]) > sizes[0]
    out = tmp_path / "full"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] + 16, hard))
    try:
        with pytest.raises(OSError, match=r"no space left.*what was finished is kept"):
            extraction(path, target).run(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "train-00000.safetensors" in contents(out)
    assert not list(out.glob(".*.partial"))
    extraction(path, target).run(out)
    assert FeatureStore.open(out).rows("train") == whole.rows("train")


def test_a_store_that_the_disk_cannot_hold_is_refused_before_it_starts(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "answers", random_rows())
    run = extraction(path, tiny_target(), taps="eagle3,eagle", top_k=32)
    needed = run.plan.chosen(tmp_path)["bytes"] + features._HEADER_BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=f"{needed - 1:,} are free") as refused:
        run.run(tmp_path / "store")
    assert f"needs {needed:,} bytes" in str(refused.value)
    assert not (tmp_path / "store").exists()
    usage = usage._replace(free=needed)
    run.run(tmp_path / "store")


def test_a_refusal_names_the_largest_choices_that_do_fit():
    layout = FeatureLayout((2, 16, 29, 32), 4096, 128256, 32, "bf16", 128, 64, "bfloat16")
    counts = Counts(rows=10, tokens=10_000, places=5_000)
    with pytest.raises(ValueError, match="give another --out") as refused:
        refuse_what_does_not_fit(layout.num_bytes(counts), 90_000_000, "store", layout, counts)
    told = [each.split(":")[0] for each in str(refused.value).split("store less: ")[1].split("; ")]
    assert told == [
        "--taps 2,16,29,32 --dtype int8 --top-k 0",
        "--taps 2,16,29 --dtype int8 --top-k 16",
        "--taps 32 --dtype bf16 --top-k 64",
        "--taps none --dtype bf16 --top-k 64",
    ]
    assert str(refused.value).count("still too many") == 2


def test_rows_longer_than_the_context_are_cut_and_counted(tmp_path):
    rows = random_rows(6, longest=300)
    rows.append({"tokens": [5] * 300, "answers": [[290, 300]], "id": "late"})
    store = make_store(tmp_path, tiny_target(), rows=rows)
    split = store.index.splits["train"]
    assert (split.rows, split.cut, split.dropped) == (6, 7, 1)
    assert max(len(row.tokens) for row in store.rows("train")) == 256
    assert store.rows("train")[2].answers == ((147, 256),)


def test_rows_with_the_same_id_are_told_apart(tmp_path):
    rows = [{"tokens": [n, n + 1, n + 2], "answers": [[1, 3]], "id": "a"} for n in range(3)]
    store = make_store(tmp_path, tiny_target(), rows=rows, held_out=rows[:1])
    assert [row.id for row in store.rows("train")] == ["a", "a (2)", "a (3)"]
    assert [row.id for row in store.rows("held_out")] == ["a (4)"]
    assert store.get("a (3)").tokens.tolist() == [2, 3, 4]


def test_a_plain_file_makes_a_store_with_one_split(tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", random_rows())
    extraction(path, tiny_target()).run(tmp_path / "store")
    assert FeatureStore.open(tmp_path / "store").splits() == ("train",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": "eagle3,7"}, "tap '7' does not exist.*from 0 .* to 2"),
        ({"taps": "-1"}, "tap '-1' does not exist"),
        ({"taps": "eagle4"}, "eagle3, eagle, medusa, none"),
        ({"top_k": 98}, "top_k is 98 .* vocabulary of 97"),
        ({"top_k": 0, "taps": "0,1"}, "computed from tap 2"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"max_len": 500}, "max_len is 500 but the target's context is only 256"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    path = write_folder(tmp_path / "answers", random_rows(1))
    with pytest.raises(ValueError, match=message):
        extraction(path, tiny_target(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "layout.top_k is 8, not 9"),
        ({"dtype": "float32"}, "layout.dtype is bf16, not float32"),
        ({"batch_tokens": 64}, "settings.batch_tokens is 4096, not 64"),
    ],
)
def test_a_folder_with_another_store_is_refused(tmp_path, change, message):
    make_store(tmp_path, tiny_target())
    with pytest.raises(ValueError, match=message):
        make_store(tmp_path, tiny_target(), **change)


def test_a_folder_with_another_targets_or_other_rows_store_is_refused(tmp_path):
    make_store(tmp_path, tiny_target())
    with pytest.raises(ValueError, match=r"target\.weights is"):
        make_store(tmp_path, tiny_target(seed=1))
    shutil.rmtree(tmp_path / "answers")
    rows = random_rows()
    rows[3]["domain"] = "another"
    with pytest.raises(ValueError, match="rows is"):
        make_store(tmp_path, tiny_target(), rows=rows)


def test_answers_of_another_target_are_refused(tmp_path):
    path = write_folder(tmp_path / "answers", random_rows())
    manifest = json.loads((path / "answers.json").read_text())
    manifest["target"] = {"name": "other", "weights": "0" * 64}
    (path / "answers.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="written by target 'other'"):
        extraction(path, tiny_target())


def test_states_that_are_not_finite_stop_the_run_and_name_the_row(tmp_path):
    target = tiny_target()
    target.model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    path = write_folder(tmp_path / "answers", random_rows())
    with pytest.raises(FloatingPointError, match=r"hidden_states\[2\] of row 'row 0'"):
        extraction(path, target).run(tmp_path / "store")


def test_logits_that_the_projection_alone_does_not_make_are_not_left_out(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from specdec.targets.hf import HFTarget

    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=0.5,
    )
    target = HFTarget(Gemma2ForCausalLM(config).eval())
    path = write_folder(tmp_path / "answers", random_rows())
    with pytest.raises(ValueError, match="does more to its logits"):
        extraction(path, target, taps="eagle", top_k=0).run(tmp_path / "store")
    extraction(path, target, taps="eagle", top_k=4).run(tmp_path / "store")


def test_presets_are_the_taps_that_new_heads_read():
    from specdec.data.feature_store import resolve_taps
    from specdec.drafters.heads import build_head

    for num_layers in (2, 3, 6):
        target = tiny_target(num_layers=num_layers)
        for kind in ("medusa", "eagle", "eagle3"):
            taps = build_head(kind, {}, target).taps
            assert resolve_taps(kind, num_layers) == tuple(sorted(set(taps)))
    assert resolve_taps("eagle3, eagle,1", 16) == (1, 2, 8, 13, 16)


@pytest.fixture
def command(tmp_path):
    """Arguments of the command, with a target in a folder."""
    tiny_llama(num_layers=3).save_pretrained(tmp_path / "target")
    save_tokenizer(tmp_path / "target")
    path = write_folder(tmp_path / "answers", random_rows())
    return ["features", str(path), "--target", str(tmp_path / "target"), "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_command_fills_a_store_that_can_be_checked(command, tmp_path):
    done = invoke(*command, "--out", str(tmp_path / "store"), "--dtype", "int8", "--top-k", "4")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    store = FeatureStore.open(tmp_path / "store")
    assert summary["tokens"] == sum(len(row.tokens) for row in store.rows("train"))
    assert store.layout.dtype == "int8"
    assert store.index.target.tokenizer is not None
    checked = invoke("features", str(tmp_path / "store"), "--check")
    assert json.loads(checked.stdout)["rows"] == {"train": 9, "held_out": 0}


def test_a_dry_run_tells_the_bytes_that_the_run_then_takes(command, tmp_path):
    options = ("--taps", "eagle3", "--top-k", "5")
    dry = invoke(*command, "--dry-run", *options)
    assert dry.exit_code == 0, dry.stderr
    assert "chosen" in dry.stdout
    told = json.loads(dry.stdout.splitlines()[-1])
    assert told["chosen"] in told["choices"]
    assert invoke(*command, "--out", str(tmp_path / "store"), *options).exit_code == 0
    (shard,) = FeatureStore.open(tmp_path / "store").index.splits["train"].shards
    assert 0 <= shard.bytes - told["chosen"]["bytes"] < features._HEADER_BYTES


def test_a_dry_run_needs_only_the_ends_of_the_target(command, tmp_path):
    from checkpoints import edit_weights

    def keep_ends(weights):
        for name in [name for name in weights if "layers" in name]:
            del weights[name]

    edit_weights(tmp_path / "target", keep_ends)
    assert invoke(*command, "--dry-run").exit_code == 0
    with pytest.raises(ValueError, match="missing"):
        load_target(str(tmp_path / "target"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--taps", "9"), "from 0 (the embeddings) to 3"),
        ((), "--out must be given"),
    ],
)
def test_bad_input_ends_with_status_two(command, change, message):
    done = invoke(*command, *change, *(["--out", "x"] if change else []))
    assert done.exit_code == 2
    assert message in done.stderr
