"""The records of a run: what comes back after a kill."""

import json

import pytest

from specdec.bench.measure import Call, Run
from specdec.bench.results import Memory
from specdec.bench.runner import Key, Store
from specdec.engine.metrics import StepRecord

TARGET = {"hidden_size": 8, "facts": {"vocab_size": 9}}
IDENTITY = {"config": {"repeats": 1}, "the target": TARGET}
FIRST, SECOND = Key(0, 0, "model"), Key(0, 1, "model")


def run(num_steps):
    records = [StepRecord(0, s, 1, 4, 1, 2, 2, 0.1, 0.2, 0.4) for s in range(num_steps)]
    tokens = list(range(1 + 2 * num_steps))
    return Run(tokens, 1, 0.5, 0.4 * num_steps, records, 0.25, 0.1, [0.5, 0.9], [1, 2 * num_steps])


def call(*rows):
    memory = Memory(peak_rss_bytes=9, peak_device_bytes=None, cache_bytes=4)
    return Call(list(rows), 1.5, memory, 2.5)


def stored(folder, calls, date="first"):
    """Open a folder's store, and keep these calls there."""
    with Store(folder, IDENTITY, {"date": date}) as store:
        for key, each in calls.items():
            store.add(key, each)
        return store


def test_calls_come_back_as_they_were_stored(tmp_path):
    calls = {FIRST: call(run(3), "ValueError: too long", run(0), run(2)), SECOND: call("nothing")}
    stored(tmp_path, calls)
    assert stored(tmp_path, {}).done == calls
    row = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[2])
    assert (row["repeat"], row["call"], row["arm"]) == FIRST
    assert [step["num_accepted"] for step in row["rows"][0]["records"]] == [1, 1, 1]
    assert row["rows"][1] == "ValueError: too long"


def test_provenance_is_of_the_last_start_that_measured(tmp_path):
    stored(tmp_path, {FIRST: call(run(1))})
    assert stored(tmp_path, {}, "second").provenance == {"date": "first"}
    third = stored(tmp_path, {SECOND: call(run(1))}, "third")
    assert third.provenance == stored(tmp_path, {}, "fourth").provenance == {"date": "third"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:20],
        lambda line: b"\x00" * 200 + b"\n",
        lambda line: b"\xff\xfe half a line",
        lambda line: line.replace(b"[", b"("),
        lambda line: b'{"repeat":0,"call":1,"arm":"model","rows":[3]}\n',
    ],
    ids=["half a line", "zeros", "not text", "not JSON", "another thing"],
)
def test_damaged_call_alone_is_decoded_again(tmp_path, damage):
    stored(tmp_path, {FIRST: call(run(2)), SECOND: call(run(3)), Key(0, 2, "model"): call(run(1))})
    path = tmp_path / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage(lines[3])]))
    assert set(stored(tmp_path, {}).done) == {FIRST}
    stored(tmp_path, {SECOND: call(run(3))})
    assert set(stored(tmp_path, {}).done) == {FIRST, SECOND}
