"""Processes that share a bench: what they join is what one process gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoints import save_checkpoint
from tiny_models import perturbed, tiny_llama
from typer.testing import CliRunner

from specdec.bench.config import load_config
from specdec.bench.runner import Processes, joined_processes, run_bench
from specdec.cli import app

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TIMES = {"wall_s", "draft_s", "target_s", "verify_s", "commit_s", "ttft_s", "decode_s"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Five prompts in three calls, sampled."""
    folder = tmp_path_factory.mktemp("bench")
    save_checkpoint(folder / "target")
    save_checkpoint(folder / "draft", perturbed(tiny_llama(), 0.1))
    (folder / "prompts.txt").write_text("hello hello\nabcabcab\nx\nsee the sea\nqrs\n")
    (folder / "bench.yaml").write_text(
        f"""
target: {{path: {folder / "target"}}}
prompts: {{source: {folder / "prompts.txt"}}}
sampling: {{temperature: 1}}
max_new_tokens: 10
batch_size: 2
repeats: 2
threads: 1
arms:
  - {{type: ngram, options: {{min_ngram: 1}}}}
  - {{type: draft_model, options: {{path: {folder / "draft"}, num_draft_tokens: 3}}}}
"""
    )
    return str(folder / "bench.yaml")


@pytest.fixture(scope="module")
def alone(path, tmp_path_factory):
    """The folder of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_bench(load_config(path), folder)
    return folder


def without_times(value):
    """Counts and tokens of records; seconds and memory are the machine's."""
    if isinstance(value, list):
        return [without_times(each) for each in value]
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES | {"memory"}}
    return value


def records(folder):
    """Lines of all files of a run; their order is that of time."""
    files = [*folder.glob("records.jsonl"), *folder.glob("shards/*.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(
        json.dumps(without_times(row), sort_keys=True) for row in rows if row["kind"] != "run"
    )


def figures(folder):
    """What results say of tokens, not of time."""
    found = json.loads((folder / "results.json").read_text())
    keys = ("name", "tau", "tau_ci", "acceptance_rate", "per_depth", "per_depth_conditional")
    counts = ("steps", "drafted", "accepted", "tokens", "tau", "finish")
    return found["prompts"], [
        {
            **{key: arm[key] for key in (*keys, "finish", "tokens", "prompts", "failures")},
            "domains": {k: (v["prompts"], v["tau_ci"]) for k, v in arm["domains"].items()},
            "per_prompt": [{key: row[key] for key in counts} for row in arm["per_prompt"]],
        }
        for arm in found["arms"]
    ]


def launch(num, path, folder, *overrides):
    command = ["-m", "specdec", "bench", path, *overrides, "--out", str(folder)]
    return subprocess.run(
        [*LAUNCH, str(num), *command], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.distributed
def test_two_processes_join_to_what_one_gives(path, alone, tmp_path):
    done = launch(2, path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path) == figures(alone)
    assert records(tmp_path) == records(alone)
    calls = []
    for shard in (0, 1):
        lines = (tmp_path / "shards" / f"records-{shard}.jsonl").read_text().splitlines()
        calls.append({json.loads(line).get("call") for line in lines} - {None})
    assert calls == [{0, 2}, {1}]
    provenance = json.loads((tmp_path / "results.json").read_text())["provenance"]
    assert provenance["processes"] == 2
    # One of them prints: a table, and the line for machines last.
    assert done.stdout.count('{"schema": "specdec-bench-3"') == 1


def test_what_other_processes_did_before_counts_as_done(path, alone, tmp_path, monkeypatch):
    """Three processes that were stopped at different places, gone on with by one."""
    config = load_config(path)
    for rank, stop in ((0, 3), (1, 2), (2, 0)):

        def halt(done, total, text, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_bench(config, tmp_path, halt, processes=Processes(rank, 3, rank))
    before = {file: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    calls = [line for text in before.values() for line in text.splitlines() if b'"call", ' in line]
    assert len(calls) == 5
    run_bench(config, tmp_path)
    assert records(tmp_path) == records(alone)
    assert figures(tmp_path) == figures(alone)
    for file, text in before.items():
        assert file.read_bytes() == text


def test_shards_of_another_configuration_are_refused(path, tmp_path):
    config = load_config(path, ["arms=[]", "repeats=1"])

    def halt(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(config, tmp_path, halt, processes=Processes(1, 2, 1))
    with pytest.raises(ValueError, match="another configuration"):
        run_bench(load_config(path, ["arms=[]", "repeats=2"]), tmp_path)


@pytest.mark.distributed
def test_a_process_that_is_killed_does_not_leave_the_others_waiting(path, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    # Without a launcher nobody else would tell the survivor.
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "specdec", "bench", path, "repeats=25", "--out", tmp_path]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = processes
    try:
        shard = tmp_path / "shards" / "records-0.jsonl"
        for _ in range(900):
            if shard.exists() and shard.read_bytes().count(b'"call", "repeat"') > 5:
                break
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        _, said = second.communicate(timeout=90)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert second.returncode == 1
    assert "another process ended before its part was done" in said
    assert not (tmp_path / "results.json").exists()


FAILING = """
import os, sys
from specdec.bench import runner
from specdec.cli import app

def failing(config, *arguments):
    if os.environ["RANK"] == "1" and config.batch_size == 2:
        raise MemoryError("no room here")
    return real(config, *arguments)

real, runner._run_missing = runner._run_missing, failing
app(sys.argv[1:])
"""


@pytest.mark.distributed
def test_a_cell_that_fails_in_one_process_fails_in_all_and_the_others_finish(path, tmp_path):
    script, grid, out = tmp_path / "failing.py", tmp_path / "grid.yaml", tmp_path / "out"
    script.write_text(FAILING)
    with open(path) as file:
        text = file.read().replace("batch_size: 2", "grid: {batch_size: [2, 1]}")
    grid.write_text(text)
    command = [*LAUNCH, "2", str(script), "bench", str(grid), "repeats=1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    joined = json.loads((out / "sweep.json").read_text())
    assert joined["cells"][0]["error"] == (
        "RuntimeError: process 1 failed: MemoryError: no room here"
    )
    assert [len(cell["arms"]) for cell in joined["cells"]] == [0, 4]
    assert joined["provenance"]["processes"] == 2


def test_each_process_takes_a_device_of_its_own_unless_one_is_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Processes(rank, 3, rank).device(None) for rank in range(3)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert Processes(1, 3, 1).device("cpu") == "cpu"
    assert Processes().device(None) is None


def test_a_launcher_s_single_process_is_a_process_alone():
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        with joined_processes(environment) as processes:
            assert processes == Processes()


def test_bad_input_of_a_sharded_bench_is_told_before_the_processes_meet(path, tmp_path):
    done = CliRunner().invoke(
        app, ["bench", path, "repeat=1"], env={"RANK": "1", "WORLD_SIZE": "2"}
    )
    assert done.exit_code == 2
    assert "did you mean repeats" in done.stderr
