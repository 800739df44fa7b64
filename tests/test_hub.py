"""A name that looks like a path is never asked of the hub; what is asked of it is said."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from fake_hub import fake_hub
from tiny_models import tiny_target

from specdec import load_drafter, load_target
from specdec.bench.prompts import load_prompts
from specdec.checkpoints import read_head
from specdec.common import hub
from specdec.common.hub import HERE, find_path, push
from specdec.data.dialogue import load_chat
from specdec.data.queries import open_source
from specdec.demo import demo_path
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
    hub._say.cache_clear()
    names = ["hub:owner/name", "hub:gpt2", "gpt2", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"]
    assert [find_path(name, "") for name in names] == [n.removeprefix("hub:") for n in names]
    # Once for each id, of which two names stand for one.
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * (len(names) - 1)
    assert "owner/name is taken from the hub" in caplog.text
    with pytest.raises(FileNotFoundError, match="is not a folder or file here"):
        find_path("owner/name", "it")
    with pytest.raises(ValueError, match="'hub:a/b/c' is no id of the hub"):
        find_path("hub:a/b/c", "")


@pytest.mark.slow
def test_a_drafter_is_pushed_and_loaded_by_its_name_on_the_hub(tmp_path):
    folder = tmp_path / "head"
    shutil.copytree(demo_path("medusa"), folder)
    (folder / "optimizer.bin").write_bytes(b"not of a drafter")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\n{HERE}\n")
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "right"}

    def run(*words, **changed):
        environment = {**os.environ, **settings, "HF_ENDPOINT": address, **changed}
        return subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    with fake_hub() as (address, repositories, asked):
        push = ["-m", "specdec", "push", str(folder), "me/mine"]
        refused = run(*push, HF_TOKEN="wrong")
        assert refused.returncode == 1
        assert "me/mine could not be written" in refused.stderr
        assert "hf auth login" in refused.stderr
        done = run(*push)
        assert done.returncode == 0, done.stderr
        assert f"{address}/me/mine/commit" in done.stdout
        files = repositories["me/mine"]
        assert {"README.md", "model.safetensors", "specdec.json"} <= set(files)
        assert "optimizer.bin" not in files
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert HERE.encode() not in files["README.md"]
        assert b"me/mine" in files["README.md"]
        found = run("-m", "specdec", "inspect", "me/mine", "--json")
        assert json.loads(found.stdout)["kind"] == "medusa", found.stderr
        script = (
            "from specdec import load_drafter, load_target; target = load_target('demo');"
            "print(type(load_drafter('me/mine', target)).__name__)"
        )
        loaded = run("-c", script)
        assert loaded.stdout.strip() == "MedusaDrafter", loaded.stderr
        words = ["generate", "--prompt", "Hi", "--drafter", "me/mine", "--max-new-tokens", "4"]
        spoken = run("-m", "specdec", *words)
        assert "[4 tokens" in spoken.stderr
        assert run("-m", "specdec", "inspect", "me/other").returncode == 2
    assert {key for _, key in asked} <= {"Bearer right", "Bearer wrong", None}


@pytest.mark.parametrize(
    ("folder", "name", "said"),
    [
        (demo_path("medusa"), "mine", "'mine' is no id of the hub; write owner/name"),
        (demo_path("medusa"), "a/b/c", "is no id of the hub"),
        (demo_path("prompts.jsonl").parent / "draft" / "none", "me/mine", "holds no safetensors"),
    ],
)
def test_what_cannot_be_pushed_is_refused(folder, name, said):
    with pytest.raises(ValueError, match=said):
        push(folder, name, "")
