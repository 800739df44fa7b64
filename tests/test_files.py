"""Files, folders and lines that are there whole or not at all, and belong to one run."""

import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from tiny_features import room_for
from typer.testing import CliRunner

from specdec.bench.prompts import load_prompts
from specdec.cli import app
from specdec.common import files
from specdec.common.files import (
    Journal,
    LineFile,
    disk_trouble,
    locked,
    read_json,
    replace_file,
    replace_files,
    whole_folder,
)
from specdec.data.queries import read_query_splits

PACKAGE = Path(files.__file__).parents[1]
OLD = {"config": "old", "weights": "old", "sub/mine": "old"}
NEW = {**OLD, "config": "new", "weights": "new"}
FULL, OTHER = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")


def test_one_module_makes_files_durable():
    primitives = re.compile(r"os\.(replace|rename)\b|\bfsync\b|\bflock\b")
    users = [path for path in PACKAGE.rglob("*.py") if primitives.search(path.read_text())]
    assert users == [Path(files.__file__)]


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    for name in OLD:
        (tmp_path / "here" / name).write_text("old")
    (tmp_path / "here" / "link").symlink_to("nowhere")
    return tmp_path / "here"


def write(folder, fail=None):
    with whole_folder(folder) as new:
        (new / "config").write_text("new")
        if fail:
            raise fail
        (new / "weights").write_text("new")


def killed_at(call, act):
    """Run it in a process that dies at its nth call of the functions that make things durable."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    left = iter(range(call))

    def counted(real, *arguments, **options):
        if next(left, None) is None:
            os._exit(9)
        return real(*arguments, **options)

    for name in ("fsync", "replace", "rename", "link"):
        setattr(os, name, partial(counted, getattr(os, name)))
    act()
    os._exit(0)


def test_killed_replacement_leaves_old_or_new_files(tmp_path):
    def write(text):
        replace_files(tmp_path, {name: [text] for name in ("a", "b", "seal")})

    write(b"old")
    call = 0
    while killed_at(call, lambda: write(b"new")):
        found = content(tmp_path)
        if "seal" in found:
            assert found["a"] == found["b"] == found["seal"]
        write(b"old")
        assert set(os.listdir(tmp_path)) == {"a", "b", "seal"}
        call += 1
    assert call > 6
    assert set(content(tmp_path).values()) == {"new"}


@pytest.mark.parametrize("swaps", [True, False])
def test_killed_folder_exchange_is_undone_by_the_next(folder, monkeypatch, swaps):
    if not swaps:  # what other systems do
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    call = 0
    while killed_at(call, lambda: write(folder)):
        files.restore(folder)
        assert content(folder) in (OLD, NEW)
        write(folder)
        assert content(folder) == NEW
        for name in ("config", "weights"):
            (folder / name).write_text("old")
        call += 1
    assert call > 5
    assert content(folder) == NEW
    assert sorted(path.name for path in folder.parent.iterdir()) == ["here"]


def test_folder_replacement_keeps_links_modes_and_other_files(folder):
    link = folder.with_name("link")
    link.symlink_to(folder)
    folder.chmod(0o750)
    write(link)
    assert content(folder) == NEW
    assert (link.is_symlink(), os.readlink(folder / "link")) == (True, "nowhere")
    assert folder.stat().st_mode & 0o777 == 0o750
    assert sorted(path.name for path in folder.parent.iterdir()) == ["here", "link"]


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        (FULL, OSError, "no space left"),
        (OTHER, PermissionError, "cannot be written"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_failed_writes_leave_everything_as_before(folder, fail, kind, message):
    def pieces():
        yield b"new"
        raise fail

    for act in (
        lambda: write(folder, fail),
        lambda: replace_files(folder, {"config": [b"new"], "weights": pieces()}),
    ):
        with pytest.raises(kind, match=message):
            act()
        assert content(folder) == OLD
        assert [path.name for path in folder.parent.iterdir()] == ["here"]


def test_mount_points_and_files_are_no_folders(folder, monkeypatch):
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


def test_full_disk_leaves_whole_lines(tmp_path):
    with LineFile(tmp_path / "lines") as lines:
        lines.append({"a": 1})
        before = lines.num_bytes
        with room_for(before + 3):
            for _ in range(2):
                with pytest.raises(OSError, match="no space left"):
                    lines.append({"b": 2}, {"c": 3})
        assert lines.num_bytes == before
        lines.append({"d": 4})
        assert list(lines.rows()) == [{"a": 1}, {"d": 4}]


@pytest.mark.parametrize(
    ("tail", "rows"),
    [(b'{"b":2', 1), (b'{"b":2}', 2), (b"\0" * 9, 1), (b'{"b":"' + b"x" * 200_000, 1), (b"", 1)],
)
def test_torn_line_is_ended_or_cut_off(tmp_path, tail, rows):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a":1}\n' + tail)
    with LineFile(path) as lines:
        lines.append({"c": 3})
        assert list(lines.rows()) == [*[{"a": 1}, {"b": 2}][:rows], {"c": 3}]


def test_lines_go_to_one_file_of_one_process(tmp_path):
    path = tmp_path / "private" / "lines"
    with LineFile(path, private=True) as lines:
        with pytest.raises(ValueError, match=r"another run is writing to .*private'"):
            LineFile(path)
        path.rename(tmp_path / "taken")
        with pytest.raises(FileNotFoundError, match="was removed during the run"):
            lines.append({"a": 1})
    assert (tmp_path / "taken").stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.symlink_to(tmp_path / "taken")
    os.mkfifo(path.with_name("pipe"))
    for elsewhere in (path, path.with_name("pipe")):
        with pytest.raises(PermissionError, match="is a link or no regular file; remove it"):
            LineFile(elsewhere, private=True)


def test_journal_resumes_the_same_run_alone(tmp_path):
    path, identity = tmp_path / "journal", {"seed": 1, "layout": {"taps": (1, 2)}, "mark": "a"}
    Journal(path, {"seed": 9}).close()  # a run that got nowhere
    with Journal(path, identity) as journal:
        journal.append({"row": 1})
        journal.append({"row": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0damaged\n" + lines[2])
    with Journal(path, identity) as journal:
        assert journal.entries == [{"row": 2}]
    other = {"seed": 2, "layout": {"taps": [3]}, "mark": "b"}
    told = r"holds another run: layout.taps is \[1, 2\] there, not \[3\]; mark .*; seed is 1 there"
    with pytest.raises(ValueError, match=told):
        Journal(path, other)

    def check(written, given):
        raise ValueError(f"{written} differs from {given}")

    with pytest.raises(ValueError, match="a differs from b"):
        Journal(path, {**identity, "mark": "b"}, {"mark": check})
    path.write_bytes(b"\n" + lines[2])
    with pytest.raises(ValueError, match="first line is damaged"):
        Journal(path, identity)


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
def test_command_refuses_a_folder_in_use(tmp_path, monkeypatch, command):
    name, *rest = command.split()
    rest = [str(PACKAGE.parent / each) if each.startswith("recipes") else each for each in rest]
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
def test_unreadable_json_is_named(tmp_path, content, message):
    path = tmp_path / "it.json"
    if content is None:
        os.mkfifo(path)  # which nobody writes to
    else:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_json(path)
    for read in (lambda: load_prompts(str(path), 1), lambda: read_query_splits(path)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"it\.json"):
            read()


def test_byte_order_marks_are_not_content(tmp_path):
    (tmp_path / "it.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "it.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert read_json(tmp_path / "it.json") == {"a": 1}
    assert load_prompts(str(tmp_path / "it.txt"), 1)[0].text == "hello"
