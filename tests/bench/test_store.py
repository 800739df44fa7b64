"""The records of a run: what comes back after a kill, and whom they refuse."""

import json

import pytest

from specdec.bench.measure import Call, Run
from specdec.bench.results import Memory
from specdec.bench.runner import Key, Store
from specdec.engine.metrics import StepRecord

TARGET = {"hidden_size": 8, "facts": {"vocab_size": 9}}
IDENTITY = {"config": {"repeats": 1}, "device": "cpu", "the target": TARGET}


def run(num_steps):
    records = [StepRecord(0, s, 1, 4, 1, 2, 2, 0.1, 0.2, 0.4) for s in range(num_steps)]
    tokens = list(range(1 + 2 * num_steps))
    return Run(tokens, 1, 0.5, 0.4 * num_steps, records, 0.25, 0.1, [0.5, 0.9], [1, 2 * num_steps])


def call(*rows):
    return Call(
        list(rows), 1.5, Memory(peak_rss_bytes=9, peak_device_bytes=None, cache_bytes=4), 2.5
    )


def stored(folder, *calls):
    """A folder with these calls; returns its file and its lines."""
    with Store(folder, IDENTITY, {"date": "first"}) as store:
        for number, each in enumerate(calls):
            store.add(Key(0, number, "model"), each)
    path = folder / "records.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


def reopened(folder, identity=IDENTITY):
    with Store(folder, identity, {"date": "second"}) as store:
        return store


def test_calls_come_back_as_they_were_stored(tmp_path):
    calls = [call(run(3), "ValueError: too long", run(0), run(2)), call("nothing")]
    stored(tmp_path, *calls)
    assert reopened(tmp_path).done == {(0, 0, "model"): calls[0], (0, 1, "model"): calls[1]}


def test_provenance_is_of_the_last_start_that_measured(tmp_path):
    stored(tmp_path, call(run(1)))
    store = reopened(tmp_path)
    assert store.provenance == {"date": "first"}
    with Store(tmp_path, IDENTITY, {"date": "third"}) as store:
        store.add(Key(0, 1, "model"), call(run(1)))
    assert store.provenance == reopened(tmp_path).provenance == {"date": "third"}


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
    path, lines = stored(tmp_path, call(run(2)), call(run(3)), call(run(1)))
    path.write_bytes(b"".join([*lines[:3], damage(lines[3])]))
    assert set(reopened(tmp_path).done) == {(0, 0, "model")}
    with Store(tmp_path, IDENTITY, {}) as store:
        store.add(Key(0, 1, "model"), call(run(3)))
    assert set(reopened(tmp_path).done) == {(0, 0, "model"), (0, 1, "model")}


def test_folder_of_another_run_is_refused(tmp_path):
    stored(tmp_path)
    other = {**IDENTITY, "config": {"repeats": 2}, "device": "A GPU"}
    with Store(
        tmp_path, other, {"date": ""}
    ) as store:  # nothing was measured, so any run may take it
        store.add(Key(0, 0, "plain"), call(run(1)))
    with pytest.raises(
        ValueError, match=r"config.repeats is 2 there, not 1; device is 'A GPU' there, not 'cpu'"
    ):
        reopened(tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"#\n" + path.read_bytes().partition(b"\n")[2])
    with pytest.raises(ValueError, match="first line is damaged"):
        reopened(tmp_path, other)
    assert len(path.read_bytes().splitlines()) == 3


def test_line_holds_a_call_with_its_steps(tmp_path):
    _, lines = stored(tmp_path, call(run(2), "broken"))
    row = json.loads(lines[2])
    assert (row["repeat"], row["call"], row["arm"]) == (0, 0, "model")
    assert [step["num_accepted"] for step in row["rows"][0]["records"]] == [1, 1]
    assert row["rows"][1] == "broken"
