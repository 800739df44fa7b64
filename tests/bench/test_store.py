"""The folder of a run: what survives a kill or a full disk, and whom it refuses."""

import json
import resource

import pytest

from specdec.bench.store import Memory, Outcome, Run, RunStore
from specdec.common.files import replace_file
from specdec.engine.metrics import StepRecord


def run(num_steps):
    records = [StepRecord(0, s, 1, 4, 1, 2, 2, 0.1, 0.2, 0.4) for s in range(num_steps)]
    return Run(list(range(1 + 2 * num_steps)), 1, 0.5, 0.4 * num_steps, records)


def outcome(*rows):
    return Outcome(list(rows), 1.5, Memory(peak_rss_bytes=9, peak_device_bytes=None, cache_bytes=4))


def stored(folder, *outcomes):
    """A folder with these batches; returns its file and its lines."""
    store = RunStore(folder, "a")
    for number, each in enumerate(outcomes):
        store.add((0, number, "model"), each)
    store.close()
    path = folder / "records.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


def reopened(folder, fingerprint="a"):
    store = RunStore(folder, fingerprint)
    store.close()
    return store.done


def test_outcomes_come_back_as_they_were_stored(tmp_path):
    outcomes = [outcome(run(3), "ValueError: too long", run(0), run(2)), outcome("nothing")]
    stored(tmp_path, *outcomes)
    assert reopened(tmp_path) == {(0, 0, "model"): outcomes[0], (0, 1, "model"): outcomes[1]}


@pytest.mark.parametrize(
    "tail",
    [
        lambda lines: [*lines[:5], lines[5][:20]],
        lambda lines: lines[:5],
        lambda lines: [*lines[:-1], lines[-1][:-1]],
        lambda lines: [*lines[:-1], b"\x00" * 200 + b"\n"],
        lambda lines: [*lines[:-1], b"\xff\xfe half a line"],
        lambda lines: [*lines[:-1], lines[-1].replace(b"[", b"(")],
    ],
    ids=["half a step", "no batch line", "no line end", "zeros", "not text", "not JSON"],
)
def test_only_the_batch_of_a_damaged_last_line_is_decoded_again(tmp_path, tail):
    path, lines = stored(tmp_path, outcome(run(2)), outcome(run(3)))
    assert len(lines) == 1 + 3 + 4
    path.write_bytes(b"".join(tail(lines)))
    resumed = RunStore(tmp_path, "a")
    assert set(resumed.done) == {(0, 0, "model")}
    resumed.add((0, 1, "model"), outcome(run(3)))
    resumed.close()
    assert path.read_bytes() == b"".join(lines)
    assert len(reopened(tmp_path)) == 2


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damage_in_the_middle_costs_only_its_own_batch(tmp_path, damaged):
    path, lines = stored(tmp_path, outcome(run(2)), outcome(run(3)), outcome(run(1)))
    path.write_bytes(b"".join([*lines[:damaged], b"#" + lines[damaged][1:], *lines[damaged + 1 :]]))
    assert set(reopened(tmp_path)) == {(0, 1, "model"), (0, 2, "model")}


def test_a_folder_without_a_finished_batch_serves_any_configuration(tmp_path):
    stored(tmp_path)
    store = RunStore(tmp_path, "b")
    store.add((0, 0, "plain"), outcome(run(1)))
    store.close()
    with pytest.raises(ValueError, match=r"another configuration.*\(b, not a\).*--out"):
        RunStore(tmp_path, "a")


def test_records_that_do_not_say_whose_they_are_are_refused(tmp_path):
    path, lines = stored(tmp_path, outcome(run(2)))
    path.write_bytes(b"".join([b"#\n", *lines[1:]]))
    with pytest.raises(ValueError, match="first line is damaged"):
        RunStore(tmp_path, "a")
    assert path.read_bytes().endswith(lines[-1])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PermissionError, match=f"{folder}.*cannot be written.*--out"):
            RunStore(folder, "a")


@pytest.fixture
def small_disk():
    """No file may grow past 4 KiB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_batches_before_it(tmp_path, small_disk):
    store = RunStore(tmp_path, "a")
    first = outcome(run(2))
    store.add((0, 0, "model"), first)
    with pytest.raises(OSError, match=r"no space left.*is kept.*same command again") as raised:
        store.add((0, 1, "model"), outcome(run(50)))
    assert not isinstance(raised.value, PermissionError)
    store.close()
    assert reopened(tmp_path) == {(0, 0, "model"): first}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, small_disk):
    path = tmp_path / "results.json"
    replace_file(path, b"{}")
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, b"x" * 5000)
    assert path.read_bytes() == b"{}"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_every_line_says_what_it_is(tmp_path):
    _, lines = stored(tmp_path, outcome(run(1), "broken"))
    assert [json.loads(line)["kind"] for line in lines] == ["run", "step", "call"]
