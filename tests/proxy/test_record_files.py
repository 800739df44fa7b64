"""The files: what a kill, a full disk, or somebody who tidies up leaves of them."""

import errno
import os
import stat

import pytest

from specdec.proxy.recorder import RecordFiles, TotalReachedError

LINE = b'{"n": 1}\n'


@pytest.fixture
def files_in(tmp_path):
    opened = []

    def files_in(max_file_bytes=10**6, max_total_bytes=10**6, **options):
        files = RecordFiles(tmp_path, max_file_bytes, max_total_bytes, **options)
        opened.append(files)
        return files

    yield files_in
    for files in opened:
        files.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("requests-*"))}


def test_a_file_that_would_grow_too_large_is_followed_by_the_next(tmp_path, files_in):
    files = files_in(max_file_bytes=2 * len(LINE))
    for _ in range(5):
        files.append(LINE)
    assert contents(tmp_path) == {
        "requests-00001.jsonl": LINE * 2,
        "requests-00002.jsonl": LINE * 2,
        "requests-00003.jsonl": LINE,
    }
    assert files.total_bytes == 5 * len(LINE)


def test_a_line_larger_than_a_file_has_a_file_of_its_own(tmp_path, files_in):
    files = files_in(max_file_bytes=10)
    for line in (LINE, LINE * 3, LINE):
        files.append(line)
    assert list(contents(tmp_path).values()) == [LINE, LINE * 3, LINE]


@pytest.mark.parametrize(
    ("left", "healed"),
    [
        (LINE + b'{"n": 2, "te', LINE),
        (LINE + b'{"n": 2}', LINE + b'{"n": 2}\n'),
        (b'{"n"', b""),
        (LINE + b"\0" * 100, LINE),
        (LINE + b"x" * 200_000, LINE),
        (LINE, LINE),
        (b"", b""),
    ],
    ids=["torn", "line end missing", "first line torn", "zeros", "long", "whole", "empty"],
)
def test_a_torn_last_line_is_healed_at_the_next_start(tmp_path, files_in, left, healed):
    (tmp_path / "requests-00001.jsonl").write_bytes(LINE)
    (tmp_path / "requests-00002.jsonl").write_bytes(left)
    files = files_in()
    files.append(LINE)
    assert contents(tmp_path) == {
        "requests-00001.jsonl": LINE,
        "requests-00002.jsonl": healed + LINE,
    }
    assert files.total_bytes == len(LINE + healed + LINE)


def failing(*results):
    """A stand-in for os.write: an error to raise, bytes that fit, or None for all of them."""
    left = list(results)

    def write(fd, line):
        result = left.pop(0) if left else None
        if isinstance(result, OSError):
            raise result
        return os.write(fd, line[:result])

    return write


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "no space"), 3, 0])
def test_a_full_disk_leaves_whole_lines_and_is_left_behind(tmp_path, files_in, trouble):
    files = files_in(write=failing(None, trouble, trouble, None))
    files.append(LINE)
    for _ in range(2):
        with pytest.raises(OSError):
            files.append(LINE)
        assert contents(tmp_path) == {"requests-00001.jsonl": LINE}
        assert files.total_bytes == len(LINE)
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE * 2}


def test_what_could_not_be_cut_off_is_healed_before_the_next_line(tmp_path, files_in, monkeypatch):
    files = files_in(write=failing(None, 3))
    files.append(LINE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(OSError(errno.EIO, "no")))
        with pytest.raises(OSError):
            files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE + LINE[:3]}
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE * 2}


def test_a_line_that_did_not_reach_the_disk_is_not_taken_for_written(
    tmp_path, files_in, monkeypatch
):
    def refuse(fd):
        raise OSError(errno.EIO, "no")

    files = files_in()
    files.append(LINE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="no"):
            files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE}


def test_a_device_that_is_always_full_raises_and_no_more(tmp_path, files_in):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    full = os.open("/dev/full", os.O_WRONLY)
    files = files_in(write=lambda fd, line: os.write(full, line))
    with pytest.raises(OSError, match="No space left"):
        files.append(LINE)
    os.close(full)
    assert contents(tmp_path) == {"requests-00001.jsonl": b""}


def test_a_line_returns_only_after_it_is_on_the_disk(files_in, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (calls.append("sync"), real(fd)))
    files = files_in(write=lambda fd, line: calls.append("write") or os.write(fd, line))
    files.append(LINE)
    assert calls[-2:] == ["write", "sync"]


def test_recording_stops_at_the_total_and_goes_on_when_files_are_taken_away(tmp_path, files_in):
    files = files_in(max_file_bytes=2 * len(LINE), max_total_bytes=3 * len(LINE))
    for _ in range(3):
        files.append(LINE)
    with pytest.raises(TotalReachedError):
        files.append(LINE)
    (tmp_path / "requests-00001.jsonl").unlink()
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00002.jsonl": LINE * 2}


def test_files_of_earlier_runs_count_towards_the_total(tmp_path, files_in):
    (tmp_path / "requests-00007.jsonl").write_bytes(LINE * 3)
    (tmp_path / "other.jsonl").write_bytes(LINE * 3)
    with pytest.raises(TotalReachedError):
        files_in(max_total_bytes=3 * len(LINE)).append(LINE)


def test_a_file_that_is_moved_away_takes_no_lines_with_it(tmp_path, files_in):
    files = files_in()
    files.append(LINE)
    (tmp_path / "requests-00001.jsonl").rename(tmp_path / "taken")
    files.append(LINE * 2)
    assert contents(tmp_path) == {"requests-00002.jsonl": LINE * 2}
    assert (tmp_path / "taken").read_bytes() == LINE


def test_only_the_owner_may_read_what_is_recorded(tmp_path, files_in):
    old = tmp_path / "requests-00001.jsonl"
    old.touch(0o644)
    files_in(max_file_bytes=1).append(LINE)
    files = RecordFiles(tmp_path / "new", 1, 10**6)
    files.append(LINE)
    files.append(LINE)
    files.close()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("requests-*")}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_folder_that_another_proxy_records_into_is_refused(tmp_path, files_in):
    files_in()
    with pytest.raises(ValueError, match="another proxy"):
        RecordFiles(tmp_path, 1, 1)
