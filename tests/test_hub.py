"""A name that looks like a path is never asked of the hub; what is asked of it is said."""

import logging

import pytest
from tiny_models import tiny_target

from specdec import load_drafter, load_target
from specdec.bench.prompts import load_prompts
from specdec.checkpoints import read_head
from specdec.common.hub import find_path
from specdec.data.dialogue import load_chat
from specdec.data.queries import open_source
from specdec.targets.load import load_ends

TARGET = tiny_target()
PATHS = """
runs/target logs/prod Models/x target ./x ../x ~/x /x/y a/b/c a\\b x.jsonl owner/x.JSON a/ a//b
x/model.safetensors mine/target ~nobody/x .hidden a:b -x
"""
ODD = ["x" * 5000 + "/y", "x\0y", "owner/name\n", "a b"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()

    def ask(*arguments, **options):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("datasets.load_dataset", ask)
    for name in ("AutoModelForCausalLM", "AutoConfig", "AutoTokenizer", "GenerationConfig"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", ask)
    return tmp_path


@pytest.mark.parametrize("name", [*PATHS.split(), *ODD])
def test_a_name_that_looks_like_a_path_is_never_a_hub_id(here, name):
    with pytest.raises(FileNotFoundError, match=r"give a file, or a hub id, .*hub:owner/name"):
        find_path(name, "a file")


@pytest.mark.parametrize(
    "load",
    [
        *(load_target, load_ends, read_head, load_chat, open_source),
        lambda name: load_drafter({"type": "eagle3", "path": name}, TARGET),
        lambda name: load_drafter({"type": "draft_model", "path": name, "device": "cpu"}, TARGET),
        lambda name: load_prompts("gsm8k", 1, name),
    ],
)
@pytest.mark.parametrize("name", ["runs/target", "mine/target", "target.json"])
def test_no_loader_asks_the_hub_for_a_path(here, load, name):
    with pytest.raises(FileNotFoundError, match=name):
        load(name)


def test_a_hub_id_is_told_by_its_prefix_and_said_in_the_log(here, caplog):
    (here / "owner").mkdir()
    names = ["hub:owner/name", "hub:gpt2", "gpt2", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"]
    assert [find_path(name, "") for name in names] == [n.removeprefix("hub:") for n in names]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(names)
    assert "owner/name is taken from the hub" in caplog.text
    with pytest.raises(FileNotFoundError, match="is not a folder or file here"):
        find_path("owner/name", "it")
    with pytest.raises(ValueError, match="'hub:a/b/c' is no id of the hub"):
        find_path("hub:a/b/c", "")
