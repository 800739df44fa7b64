"""Marks of what an arm reads from disk: another checkpoint, another mark; other files, the same."""

import pytest
from safetensors.torch import save_file
from torch import tensor

from specdec.bench.config import ArmConfig
from specdec.bench.runner import checkpoint_mark


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "draft", 1.0)


def save(folder, value):
    folder.mkdir(exist_ok=True)
    save_file({"weight": tensor([value])}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def mark(**options):
    return checkpoint_mark(ArmConfig("model", "draft_model", options))


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_checkpoint_with_other_weights_or_another_config_has_another_mark(folder, change):
    before = mark(path=str(folder))
    if change == "weights":
        save(folder, 2.0)
    else:
        (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    assert before is not None
    assert mark(path=str(folder)) != before


def test_files_that_no_drafter_reads_leave_the_mark_as_it_is(folder):
    before = mark(path=str(folder), num_draft_tokens=3)
    (folder / "train.log").write_text("step 1")
    (folder / "results.json").write_text("{}")
    assert mark(path=str(folder), num_draft_tokens=5) == before


def test_a_checkpoint_has_the_same_mark_in_another_place(folder, tmp_path):
    copied = save(tmp_path / "copy", 1.0)
    assert mark(path=str(copied)) == mark(path=str(folder))


def test_adapters_and_drafters_inside_a_drafter_count(folder, tmp_path):
    other = save(tmp_path / "other", 2.0)
    alone = mark(path=str(folder))
    assert mark(path=str(folder), adapter=str(other)) != alone
    inner = [{"type": "ngram"}, {"type": "draft_model", "path": str(folder)}]
    assert mark(drafters=inner) == alone


def test_an_arm_that_names_no_folder_with_weights_has_no_mark(tmp_path, monkeypatch):
    (tmp_path / "top").mkdir()
    (tmp_path / "model.safetensors").write_text("weights of something else")
    monkeypatch.chdir(tmp_path)
    assert mark() is None
    assert mark(path="demo", children="top", note="", num_draft_tokens=3) is None
