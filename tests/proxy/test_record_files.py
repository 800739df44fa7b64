"""The files of a recording; what a kill or a full disk leaves of a line is `LineFile`'s matter."""

import errno
import os
import stat

import pytest

from specdec.common.files import LineFile
from specdec.proxy.records import RecordFiles, TotalReachedError

LINE = b'{"n": 1}\n'


@pytest.fixture
def files_in(tmp_path):
    opened = []

    def files_in(max_file_bytes=10**6, max_total_bytes=10**6):
        opened.append(RecordFiles(tmp_path, max_file_bytes, max_total_bytes))
        return opened[-1]

    yield files_in
    for files in opened:
        files.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("requests-*"))}


def test_full_file_is_followed_by_the_next(tmp_path, files_in):
    files = files_in(max_file_bytes=2 * len(LINE))
    for line in (LINE, LINE, LINE * 3, LINE):
        files.append(line)
    assert contents(tmp_path) == {
        "requests-00001.jsonl": LINE * 2,
        "requests-00002.jsonl": LINE * 3,  # larger than a file, so it has one of its own
        "requests-00003.jsonl": LINE,
    }
    assert files.total_bytes == 6 * len(LINE)


def test_append_returns_when_the_line_is_on_the_disk(tmp_path, files_in, monkeypatch):
    synced = []
    files = files_in()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    files.append(LINE)
    assert synced[0] == len(LINE)


def test_failed_append_leaves_whole_lines_and_recovers(tmp_path, files_in, monkeypatch):
    files = files_in()
    files.append(LINE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        for _ in range(2):
            with pytest.raises(OSError, match="no"):
                files.append(LINE)
            assert contents(tmp_path) == {"requests-00001.jsonl": LINE}
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE * 2}
    assert files.total_bytes == 2 * len(LINE)


def test_line_that_cannot_be_cut_off_is_healed(tmp_path, files_in, monkeypatch):
    files = files_in()
    files.append(LINE)

    def torn(self, line, *, durable):
        with open(self.path, "ab") as file:
            file.write(line[:3])
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "write", torn)
        with pytest.raises(OSError, match="no"):
            files.append(LINE)
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00001.jsonl": LINE * 2}


def test_total_stops_recording_until_files_are_taken_away(tmp_path, files_in):
    (tmp_path / "other.jsonl").write_bytes(LINE * 3)
    (tmp_path / "requests-00007.jsonl").write_bytes(LINE * 2)  # an earlier run's
    files = files_in(max_file_bytes=2 * len(LINE), max_total_bytes=3 * len(LINE))
    files.append(LINE)
    with pytest.raises(TotalReachedError):
        files.append(LINE)
    (tmp_path / "requests-00007.jsonl").unlink()
    files.append(LINE)
    assert contents(tmp_path) == {"requests-00008.jsonl": LINE * 2}


@pytest.mark.parametrize("with_link", [False, True])
def test_moved_file_takes_no_lines_with_it(tmp_path, files_in, with_link):
    files = files_in()
    files.append(LINE)
    files.path.rename(tmp_path / "taken")
    if with_link:
        files.path.symlink_to(tmp_path / "taken")
    files.append(LINE * 2)
    assert (tmp_path / "taken").read_bytes() == LINE
    assert (tmp_path / "requests-00002.jsonl").read_bytes() == LINE * 2


def test_only_the_owner_reads_recordings_whatever_the_umask(tmp_path):
    folder = tmp_path / "above" / "new"
    before = os.umask(0)
    try:
        files = RecordFiles(folder, 1, 10**6)
        for _ in range(2):
            files.append(LINE)
        files.close()
        (folder / "requests-00002.jsonl").chmod(0o644)
        RecordFiles(folder, 1, 10**6).close()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}


def test_second_proxy_in_a_folder_is_refused(tmp_path, files_in):
    files_in()
    with pytest.raises(ValueError, match="another run is writing"):
        RecordFiles(tmp_path, 1, 1)


@pytest.mark.parametrize("name", ["requests-00001.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_recording_refuses_a_link_or_a_pipe(tmp_path, name, kind):
    folder, other = tmp_path / "recorded", tmp_path / "other"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(other)
    if kind == "link":
        other.write_text("precious")
    with pytest.raises(OSError, match="is a link or no regular file"):
        RecordFiles(folder, 100, 100).append(b"{}\n")
    assert not other.exists() or other.read_text() == "precious"
