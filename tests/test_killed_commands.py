"""A command whose process is killed outright goes on, and ends as if nothing had happened."""

import json
import multiprocessing
import signal
import time

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.messages import Query
from specdec.data.feature_store import FeatureStore
from specdec.data.queries import write_queries

pytestmark = pytest.mark.slow


def lines(path):
    """Whole lines of a file that a process may be writing to."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def written_answers(out):
    names = ("train.jsonl", "held_out.jsonl", "failed.jsonl")
    return {name: (out / name).read_text() for name in names}


def stored_features(out):
    store = FeatureStore.open(out)
    store.verify()
    return store.index.splits


def decoded_tokens(out):
    calls = [row for row in map(json.loads, lines(out / "records.jsonl")) if "arm" in row]
    return {
        (call["repeat"], call["call"], call["arm"]): [row["tokens"] for row in call["rows"]]
        for call in calls
    }


def analyzed_drafters(out):
    return json.loads((out / "analysis.json").read_text())["drafters"]


CONFIG = """
prompts: {source: demo, num: 2}
max_new_tokens: 8
repeats: 2
threads: 1
arms:
  - {name: ngram, type: ngram}
  - {name: suffix, type: suffix}
  - {name: medusa, type: medusa}
"""
# name -> arguments, what has been written when it is killed, and what must come out the same
COMMANDS = {
    "regenerate": (
        "{here}/queries --target demo --temperature 0 --temperature 0.8 --max-new-tokens 24 "
        "--batch-size 2",
        lambda out: len(lines(out / "journal.jsonl")) > 12,
        written_answers,
    ),
    "features": (
        "{here}/answers --target demo --taps 0,1,2,3,4,5,6,7,8 --dtype float32 --shard-mib 1",
        lambda out: (out / "train-00001.safetensors").exists(),
        stored_features,
    ),
    "bench": (
        "{here}/bench.yaml",
        lambda out: len(lines(out / "records.jsonl")) > 5,
        decoded_tokens,
    ),
    "analyze": (
        "{here}/bench.yaml",
        lambda out: len(lines(out / "drafters" / "drafters.jsonl")) > 2,
        analyzed_drafters,
    ),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with queries, with answers to them, and with a configuration."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "bench.yaml").write_text(CONFIG)
    queries = [Query(f"q{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(12)]
    write_queries({"train": queries[:10], "held_out": queries[10:]}, folder / "queries")
    options = ["--target", "demo", "--max-new-tokens", "100", "--out", folder / "answers"]
    run(["regenerate", folder / "queries", *options])
    return folder


def run_command(arguments):
    app(arguments)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have what takes long imported already."""
    context = multiprocessing.get_context("forkserver")
    modules = ("cli", "data.feature_store", "bench.runner", "analysis.run")
    context.set_forkserver_preload([f"specdec.{module}" for module in modules])
    return context


def run(arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_command_resumes(name, here, tmp_path, processes):
    arguments, has_begun, outcome = COMMANDS[name]
    command = [name, *arguments.format(here=here).split()]
    run([*command, "--out", tmp_path / "whole"])
    out = tmp_path / "killed"
    process = processes.Process(target=run_command, args=([*command, "--out", str(out)],))
    process.start()
    while not has_begun(out):
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    run([*command, "--out", out])
    assert outcome(out) == outcome(tmp_path / "whole")
    for path, content in before.items():
        assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1])
