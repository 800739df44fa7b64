"""Extraction: what is refused, what a killed run leaves, and that the index says what there is."""

import json
import shutil
from inspect import signature
from pathlib import Path
from unittest.mock import Mock

import pytest
from checkpoints import edit_weights, save_tokenizer
from model_matrix import HEAD, SHAPE
from tiny_features import (
    contents,
    extract,
    feature_plan,
    make_store,
    random_rows,
    room_for,
    write_folder,
)
from tiny_models import tiny_llama, tiny_target
from tiny_training import write_rows
from typer.testing import CliRunner

from specdec.cli import app
from specdec.cli.data import features as features_command
from specdec.common import files
from specdec.common.provenance import machine
from specdec.data import features
from specdec.data.feature_store import FeatureLayout, FeatureStore
from specdec.data.features import resolve_taps
from specdec.drafters.heads import build_head
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.targets.options import Placement

DOCS = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


class Killed(BaseException):
    pass


@pytest.fixture
def small_files(monkeypatch):
    """Files of a few rows."""
    monkeypatch.setattr(features, "_MIB", 20_000)


def test_index_describes_the_store(tmp_path, small_files):
    store = make_store(tmp_path, tiny_target())
    split = store.index.splits["train"]
    assert len(split.shards) > 2
    assert sum(shard.rows for shard in split.shards) == split.rows == 9
    sizes = {shard.file: shard.bytes for shard in split.shards}
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "store").iterdir()}
    assert on_disk == {**sizes, "features.json": on_disk["features.json"]}
    assert store.index.provenance.dtype == "float32"
    store.verify()


def test_run_killed_anywhere_resumes_to_the_same_bytes(tmp_path, small_files, monkeypatch):
    path = write_folder(tmp_path / "answers", random_rows(), random_rows(3, seed=1))
    target, replace_files = tiny_target(), files.replace_files
    where = machine(target)
    monkeypatch.setattr(features, "machine", lambda target: where)
    extract(path, target, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    num_writes = 2 * (len(whole) - 1) + 1  # an index before all files and after each
    for last in range(num_writes):
        out, writes = tmp_path / f"killed-{last}", []

        def killed(folder, content, last=last, writes=writes):
            if len(writes) == last:
                (folder / f".{next(iter(content))}.partial").write_bytes(b"half")
                raise Killed
            writes.append(content)
            replace_files(folder, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace_files", killed)
            with pytest.raises(Killed):
                extract(path, target, out)
        if last:
            with pytest.raises(ValueError, match="not finished"):
                FeatureStore.open(out)
        extract(path, target, out)
        assert contents(out) == whole


def test_resumed_run_repeats_no_finished_file(tmp_path, small_files, monkeypatch):
    path, target = write_folder(tmp_path / "answers", random_rows()), tiny_target()
    extract(path, target, tmp_path / "store")
    (tmp_path / "store" / "train-00001.safetensors").unlink()
    filled, shown = Mock(wraps=features.fill_shard), Mock()
    monkeypatch.setattr(features, "fill_shard", filled)
    extract(path, target, tmp_path / "store", shown)
    filled.assert_called_once()
    assert shown.call_args.args[:2] == (sum(len(row["tokens"]) for row in random_rows()),) * 2
    FeatureStore.open(tmp_path / "store").verify()


def test_disk_that_fills_up_midway_loses_nothing(tmp_path, small_files):
    path, target = write_folder(tmp_path / "answers", random_rows()), tiny_target()
    whole = make_store(tmp_path, target)
    sizes = [shard.bytes for shard in whole.index.splits["train"].shards]
    assert max(sizes[1:]) > sizes[0]
    out = tmp_path / "full"
    full = pytest.raises(OSError, match=r"no space left.*what was finished is kept")
    with room_for(sizes[0] + 16), full:
        extract(path, target, out)
    assert "train-00000.safetensors" in contents(out)
    assert not list(out.glob(".*.partial"))
    extract(path, target, out)
    assert FeatureStore.open(out).rows("train") == whole.rows("train")


def test_store_beyond_the_disk_is_refused_before_it_starts(tmp_path, monkeypatch):
    path, target = write_folder(tmp_path / "answers", random_rows()), tiny_target()
    options = {"taps": "eagle3,eagle", "top_k": 32}
    needed = feature_plan(path, target, **options).num_bytes + features._HEADER_BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=f"needs {needed:,} bytes .* {needed - 1:,} are free"):
        extract(path, target, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()
    usage = usage._replace(free=needed)
    extract(path, target, tmp_path / "store", **options)


def test_long_rows_are_cut_and_counted(tmp_path):
    late = {"tokens": [5] * 300, "answers": [[290, 300]], "id": "late"}
    rows = [*random_rows(6, longest=300), late]
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
    extract(write_rows(tmp_path / "a.jsonl", rows), tiny_target(), tmp_path / "plain")
    assert FeatureStore.open(tmp_path / "plain").index.splits.keys() == {"train"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "at least 1|greater than or equal to 1"),
        ({"taps": "eagle3,7"}, "tap '7' does not exist.*from 0 .* to 2"),
        ({"taps": "-1"}, "tap '-1' does not exist"),
        ({"taps": "eagle4"}, "eagle3.*none"),
        ({"top_k": 98}, "top_k is 98 .* vocabulary of 97"),
        ({"top_k": 0, "taps": "0,1"}, "computed from tap 2"),
        ({"max_len": 500}, "max_len is 500 but the target's context is only 256"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    path = write_folder(tmp_path / "answers", random_rows(1))
    with pytest.raises(ValueError, match=message):
        feature_plan(path, tiny_target(), **options)


def test_folder_of_another_store_is_refused(tmp_path):
    make_store(tmp_path, tiny_target())
    body, rows = tiny_target(), random_rows()
    body.model.model.layers[0].mlp.down_proj.weight.data.neg_()
    rows[3]["domain"] = "another"
    for target, change, message in (
        (tiny_target(), {"top_k": 9}, "layout.top_k is 8 there, not 9"),
        (tiny_target(), {"dtype": "float32"}, "layout.dtype is 'bf16' there, not 'float32'"),
        (tiny_target(), {"batch_tokens": 64}, "settings.batch_tokens is 4096 there, not 64"),
        (tiny_target(seed=1), {}, r"ends is .* there"),
        (body, {}, "another target: weights was"),
        (tiny_target(), {"rows": rows}, "rows is"),
    ):
        if "rows" in change:
            shutil.rmtree(tmp_path / "answers")
        with pytest.raises(ValueError, match=message):
            make_store(tmp_path, target, **change)


def test_answers_of_another_target_are_refused(tmp_path):
    path = write_folder(tmp_path / "answers", random_rows())
    manifest = json.loads((path / "answers.json").read_text())
    other = manifest["target"] | {"name": "other", "weights": "0" * 64}
    (path / "answers.json").write_text(json.dumps({**manifest, "target": other}))
    with pytest.raises(ValueError, match="written by target 'other'"):
        feature_plan(path, tiny_target())


def test_states_that_are_not_finite_name_the_row(tmp_path):
    target = tiny_target()
    target.model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    path = write_folder(tmp_path / "answers", random_rows())
    with pytest.raises(FloatingPointError, match=r"hidden.2 of row 'row 0'"):
        extract(path, target, tmp_path / "store")


def test_logits_beyond_the_projection_are_not_left_out(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = SHAPE | HEAD | {"vocab_size": 97, "final_logit_softcapping": 0.5}
    target = HFTarget(Gemma2ForCausalLM(Gemma2Config(**sizes)).eval())
    path = write_folder(tmp_path / "answers", random_rows())
    with pytest.raises(ValueError, match="does more to its logits"):
        extract(path, target, tmp_path / "store", taps="eagle", top_k=0)
    extract(path, target, tmp_path / "store", taps="eagle", top_k=4)


def test_kinds_name_the_taps_of_new_heads():
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


def test_command_fills_a_store_of_the_size_it_told(command, tmp_path):
    options = ("--taps", "eagle3", "--top-k", "5", "--dtype", "float32")
    dry = invoke(*command, "--dry-run", *options)
    assert dry.exit_code == 0, dry.stderr
    told = json.loads(dry.stdout.splitlines()[-1])
    done = invoke(*command, "--out", str(tmp_path / "store"), *options)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    store = FeatureStore.open(tmp_path / "store")
    num_tokens = sum(len(row.tokens) for row in store.rows("train"))
    assert summary["tokens"] == told["tokens"] == num_tokens
    assert store.layout.dtype == "float32"
    assert store.index.target.tokenizer is not None
    (shard,) = store.index.splits["train"].shards
    assert 0 <= shard.bytes - told["bytes"] < features._HEADER_BYTES
    checked = invoke("features", str(tmp_path / "store"), "--check")
    assert json.loads(checked.stdout.splitlines()[-1])["rows"] == {"train": 9, "held_out": 0}


def test_dry_run_needs_only_the_ends_of_the_target(command, tmp_path):
    def keep_ends(weights):
        for name in [name for name in weights if "layers" in name]:
            del weights[name]

    edit_weights(tmp_path / "target", keep_ends)
    assert invoke(*command, "--dry-run").exit_code == 0
    with pytest.raises(ValueError, match="missing"):
        load_target(str(tmp_path / "target"))


def test_bad_input_ends_with_status_two(command):
    for change, message in (
        (["--dtype", "int8", "--out", "x"], "dtype is 'int8' but must be one of"),
        (["--batch-tokens", "0", "--out", "x"], "batch_tokens is 0 but must be at least 1"),
        ([], "--out must be given"),
    ):
        done = invoke(*command, *change)
        assert (done.exit_code, message in done.stderr) == (2, True)


# A target of 8B, half of whose tokens are answers.
HALF = {"num_tokens": 10**8, "num_places": 5 * 10**7}
LARGE = {"hidden_size": 4096, "vocab_size": 128_256, "num_layers": 32, "logits_dtype": "bfloat16"}
LARGE |= {"key_value_size": 32 * 2 * 8 * 128}


@pytest.mark.parametrize("line", [line for line in DOCS.splitlines() if line.endswith(" GB |")])
def test_documented_sizes_are_those_of_the_code(line):
    taps, dtype, top_k, per_token, size = (cell.strip(" `") for cell in line.strip("|").split("|"))
    kept = {"dtype": dtype.replace("-", "bf16"), "top_k": int(top_k.replace(",", ""))}
    layout = FeatureLayout(taps=resolve_taps(taps, 32), **kept, **LARGE)
    num_bytes = layout.num_bytes(**HALF)
    assert (per_token, size) == (f"{num_bytes / 1e8:,.0f}", f"{num_bytes / 1e9:,.0f} GB")


def test_every_option_is_documented():
    names = set(signature(features_command).parameters) - {"answers", "json", "threads"}
    names -= set(Placement.model_fields)  # of every command that loads a target
    assert not [name for name in names if f"--{name.replace('_', '-')}" not in DOCS]


def test_dry_run_reads_the_revision_that_is_asked_for(command, monkeypatch):
    def load(path, **given):
        raise ValueError(f"asked for {given['revision']}")

    monkeypatch.setattr("specdec.targets.load.load_ends", load)
    assert "asked for old" in invoke(*command, "--dry-run", "--revision", "old").stderr
