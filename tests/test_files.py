"""Folders that are replaced whole, and folders that one run has to itself."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.bench.prompts import load_prompts
from specdec.bench.store import read_records
from specdec.cli import app
from specdec.common import files
from specdec.common.files import disk_trouble, locked, read_json, replace_file, whole_folder
from specdec.data.sources import read_query_splits


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    for name in ("config", "weights", "sub/mine"):
        (tmp_path / "here" / name).write_text("old")
    (tmp_path / "here" / "link").symlink_to("nowhere")
    return tmp_path / "here"


OLD = {"config": "old", "weights": "old", "sub/mine": "old"}


def write(folder, *, fail=None):
    with whole_folder(folder) as new:
        (new / "config").write_text("new")
        if fail:
            raise fail
        (new / "weights").write_text("new")


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_whole_and_keeps_what_is_not_replaced(folder, monkeypatch, swaps):
    if not swaps:  # what other systems do
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    link = folder.with_name("link")
    link.symlink_to(folder)
    folder.chmod(0o750)
    write(link)
    assert content(folder) == {**OLD, "config": "new", "weights": "new"}
    assert (link.is_symlink(), os.readlink(folder / "link")) == (True, "nowhere")
    assert folder.stat().st_mode & 0o777 == 0o750
    assert sorted(path.name for path in folder.parent.iterdir()) == ["here", "link"]


FULL, OTHER = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        (FULL, OSError, "no space left"),
        (OTHER, PermissionError, "cannot be written"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_folder_that_could_not_be_written_is_as_before(folder, fail, kind, message):
    with pytest.raises(kind, match=message):
        write(folder, fail=fail)
    assert content(folder) == OLD
    assert [path.name for path in folder.parent.iterdir()] == ["here"]


def test_a_crash_between_two_renames_is_undone_by_the_next_run(folder, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    rename = Path.rename

    def crash(path, to):
        if path.name == ".here.partial":
            raise SystemExit
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        patch.setattr(files, "restore", lambda folder: None)  # nothing runs in a crash
        with pytest.raises(SystemExit):
            write(folder)
    write(folder)
    assert content(folder) == {**OLD, "config": "new", "weights": "new"}


def test_a_mount_point_and_a_file_are_refused_in_words(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: True)
        with pytest.raises(PermissionError, match=r"here.*is a mount point; give a folder"):
            write(folder)
    assert content(folder) == OLD
    with pytest.raises(PermissionError, match=r"config.*cannot be written \(Not a directory\)"):
        write(folder / "config" / "sub")
    with pytest.raises(PermissionError, match=r"config.*cannot be written \(it is a file"):
        write(folder / "config")
    with pytest.raises(PermissionError, match="cannot be written"), locked(folder / "config"):
        pass


def test_only_one_run_has_a_folder(tmp_path):
    with locked(tmp_path / "out"):
        taken = pytest.raises(ValueError, match=r"another run is writing to .*out'")
        with taken, locked(tmp_path / "out"):
            pass
        with locked(tmp_path / "out", is_writer=False):
            replace_file(tmp_path / "out" / "a", b"a")
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="was removed during the run"):
            replace_file(tmp_path / "out" / "a", b"a")
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
    in_words = disk_trouble(tmp_path, FULL)
    assert disk_trouble(tmp_path, in_words) is in_words


@pytest.mark.parametrize(
    "command",
    [
        "bench demo",
        "bench demo/single-turn",
        "analyze demo",
        "plan demo",
        "plan --roofline recipes/roofline-70b.yaml",
        "features nothing --target demo",
        "train recipes/demo/eagle.yaml data.path=nothing",
        "collect queries.jsonl",
    ],
)
def test_a_command_refuses_a_folder_that_another_run_writes_to(tmp_path, monkeypatch, command):
    name, *rest = command.split()
    root = Path(files.__file__).parent.parent
    rest = [str(root / each) if each.startswith("recipes") else each for each in rest]
    monkeypatch.chdir(tmp_path)
    Path("queries.jsonl").write_text('{"text": "a"}\n')
    with locked(Path("out"), Path(".out.lock") if name == "collect" else None):
        done = CliRunner().invoke(app, [name, *rest, "--out", "out"])
    assert done.exit_code == 2, done.output
    assert "another run is writing to 'out'; wait for it or choose another --out" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{" + b'"a": {' * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'{"a": "\0"}', "control character"),
        (b"\xff", "codec can't decode"),
        (b"1" * 5000, "limit"),
        (b"[]", "holds list"),
        (None, r"has no it\.json"),
    ],
)
def test_a_file_that_is_no_json_object_is_told_in_words(tmp_path, content, message):
    path = tmp_path / "it.json"
    if content is None:
        os.mkfifo(path)  # which nobody writes to
    else:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_json(path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"it\.json"):
        load_prompts(str(path), 1)
    with pytest.raises((ValueError, FileNotFoundError), match=r"it\.json"):
        read_query_splits(path)


def test_a_byte_order_mark_is_no_part_of_what_is_read(tmp_path):
    (tmp_path / "it.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "it.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert read_json(tmp_path / "it.json") == {"a": 1}
    assert load_prompts(str(tmp_path / "it.txt"), 1)[0].text == "hello"


def test_lines_of_records_that_say_something_else_are_passed_over(tmp_path):
    lines = [
        {"kind": "run", "config_fingerprint": "mark"},
        {"kind": "step", "repeat": 0},
        {"kind": "call"},
        {"kind": []},
        {},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, 3, [1]]))
    assert read_records(path, "mark", tmp_path).done == {}
