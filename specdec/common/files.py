"""Durable files: a file, a folder or a line is there whole or not at all."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, Self

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_CWD, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the error's type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text; an object that holds a key twice is a `ValueError`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse the object of a JSON line; empty for one that is damaged or was never finished."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{str(path.parent)!r} has no {path.name}")
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        what = f"is not JSON ({error}); it is corrupt or truncated, copy it again"
        raise ValueError(f"{str(path)!r} {what}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, it must hold an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def disk_trouble(folder: Path, error: OSError) -> OSError:
    """Put the error of a write into words; one that is in words already stays."""
    if error.errno is None:
        return error
    if error.errno in _NO_SPACE:
        return OSError(
            f"no space left in {str(folder)!r} ({error.strerror}): the disk is full; what was "
            "finished is kept: make room and give the same command again"
        )
    if error.errno == errno.ENOENT:
        why = "or a file in it, was removed during the run; give the same command again"
        if not folder.exists():
            why = "cannot be made, or was removed during the run; give one that can be"
        return FileNotFoundError(f"the output folder {str(folder)!r}, {why}")
    why = f"cannot be written ({error.strerror}); choose another --out"
    return PermissionError(f"the output folder {str(folder)!r} {why}")


@contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_trouble(folder, error) from error


def check_same_run(
    folder: Path,
    written: Mapping[str, Any] | None,
    given: Mapping[str, Any],
    checks: Mapping[str, Callable[[Any, Any], None]] | None = None,
) -> None:
    """Refuse to resume a run in a folder that another run began; name the facts that differ.

    Facts are JSON values. `checks` compares those that equality is too strict for, by key.
    """
    fix = "choose another --out folder or remove this one"
    if written is None:
        raise ValueError(f"{str(folder)!r} holds another run: its first line is damaged; {fix}")
    checks = checks or {}
    written, given = json.loads(json.dumps([written, given]))  # tuples are lists there
    was, now = ({k: v for k, v in run.items() if k not in checks} for run in (written, given))
    theirs, ours = dict(flat(was)), dict(flat(now))
    different = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
    if different:
        facts = (f"{k} is {theirs.get(k)!r:.60} there, not {ours.get(k)!r:.60}" for k in different)
        raise ValueError(f"{str(folder)!r} holds another run: {'; '.join(facts)}; {fix}")
    for key, check in checks.items():
        check(written.get(key), given.get(key))


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, each with its keys as one: `a.b`."""
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _make_folder(folder: Path, private: bool) -> None:
    """Make a folder and those above it that are missing, if private for their owner alone."""
    for each in [*reversed(folder.parents), folder]:
        if not each.exists():
            each.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


def _private_opener(path: str, flags: int) -> int:
    """Open a file for its owner alone, and nothing put in its place; an `opener` of `open`."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.ENXIO, f"{path!r} is a link or no regular file; remove it")
    opened = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    os.fchmod(opened, 0o600)  # it may have been there before
    return opened


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "posix":  # other systems cannot, and need not
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def replace_file(path: Path, content: bytes) -> None:
    replace_files(path.parent, {path.name: [content]})


def replace_files(
    folder: Path, contents: Mapping[str, Iterable[bytes]], *, private: bool = False
) -> None:
    """Write files under other names, wait until they are on the disk, then rename them.

    The last of several is the seal, removed first and renamed last: what it seals belongs to it.
    """
    partial = {name: folder / f".{name}.partial" for name in contents}
    try:
        with _in_words(folder):
            for name, pieces in contents.items():
                with open(partial[name], "wb", opener=_private_opener if private else None) as file:
                    file.writelines(pieces)
                    file.flush()
                    os.fsync(file.fileno())
            if len(contents) > 1:
                (folder / list(contents)[-1]).unlink(missing_ok=True)
            for name, path in partial.items():
                os.replace(path, folder / name)
            _sync(folder)
    except BaseException:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


class LineFile:
    """A file of lines that only grows, for one process at a time.

    A killed process loses no line; what it, or a full disk, left of one is cut off.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        self.path = path
        self._stat = os.lstat if private else os.stat  # a private file is never behind a link
        with _in_words(path.parent):
            _make_folder(path.parent, private)
            opener = _private_opener if private else None
            self._file = open(path, "a+b", buffering=0, opener=opener)  # noqa: SIM115
            _sync(path.parent)  # the name of a new file
        _lock(self._file, path.parent)
        if not self.num_bytes:
            return
        # A last line without its end is cut off, or ended if it lacks nothing else.
        with mmap(self._file.fileno(), 0, access=ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if parse_line(tail + b"\n"):
            self._file.write(b"\n")
        elif tail:
            self._file.truncate(start)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    @property
    def is_in_place(self) -> bool:
        """True while the path still names this file; else lines would be lost with it."""
        try:
            return os.path.samestat(self._stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def rows(self) -> Iterator[dict[str, Any]]:
        """Parse the lines; a damaged one is an empty row."""
        with self.path.open("rb") as file:
            yield from map(parse_line, file)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows, all of them or none."""
        self.write("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows).encode())

    def write(self, lines: bytes, *, durable: bool = False) -> None:
        """Add whole lines, all of them or none."""
        before = self.num_bytes
        try:
            if not self.is_in_place:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if (self._file.write(lines) or 0) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(before)
            raise disk_trouble(self.path.parent, error) from error

    def close(self) -> None:
        """Wait until everything is on the disk, and let others write to the file."""
        with suppress(OSError):  # a full disk; `write` has complained already
            os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Journal(LineFile):
    """Everything a run has finished, a JSON line each; the first line says which run it is."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        checks: Mapping[str, Callable[[Any, Any], None]] | None = None,
        *,
        private: bool = False,
    ) -> None:
        super().__init__(path, private=private)
        try:
            first, *rows = [*self.rows()] or [{}]
            self.entries = [row for row in rows if row]  # whoever has read them may clear them
            if self.entries:
                check_same_run(path.parent, first.get("run"), identity, checks)
            else:  # a run that got nowhere: its folder serves any other
                self._file.truncate(0)
                self.append({"run": identity})
        except BaseException:
            self.close()
            raise


def _lock(file: IO[Any], folder: Path) -> None:
    """Lock a file of a folder until it is closed, however its process ends."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that ends just now may have removed the file before we had the lock.
        if os.fstat(file.fileno()).st_nlink:
            return
    except BlockingIOError:
        pass
    file.close()
    raise ValueError(
        f"another run is writing to {str(folder)!r}; wait for it or choose another --out folder"
    )


@contextmanager
def locked(folder: Path, file: Path | None = None, *, is_writer: bool = True) -> Iterator[None]:
    """Have a folder to oneself; it is made if it is not there, and removed if it stays empty."""
    if not is_writer:
        yield
        return
    path = file or folder.expanduser() / ".lock"
    is_new = not path.parent.exists()
    with _in_words(path.parent):
        _make_folder(path.parent, private=file is not None)
        opened = path.open("a")
    with opened:
        _lock(opened, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    path.unlink()
                    if is_new:
                        path.parent.rmdir()  # if nothing was written


@contextmanager
def whole_folder(folder: Path, *, private: bool = False) -> Iterator[Path]:
    """Make a new folder to write into; it takes the place of `folder` when the block ends well.

    Until then, and after a crash, what stood there before stays. Files and folders in it that the
    new one does not have are carried over. A link stays a link: the folder behind it is replaced.
    """
    folder = folder.resolve()
    partial, before = _beside(folder, "partial"), _beside(folder, "before")
    try:
        restore(folder)
        if folder.exists() and (folder.is_mount() or not folder.is_dir()):
            kind = "mount point" if folder.is_mount() else "file"
            raise OSError(errno.EBUSY, f"it is a {kind}; give a folder in its place, or in it")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
        _make_folder(partial, private)
        yield partial
        for path in [partial, *partial.rglob("*")]:
            if private:
                path.chmod(0o700 if path.is_dir() else 0o600)
            _sync(path)
        if folder.exists():
            _carry_over(folder, partial)
            if not private:
                shutil.copymode(folder, partial)
            _swap(folder, partial, before)
        else:
            partial.rename(folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        restore(folder)
        if isinstance(error, OSError):
            raise disk_trouble(folder if folder.exists() else folder.parent, error) from error
        raise
    for old in (partial, before):
        shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo what a run did that was killed while it exchanged the folder for the new one."""
    before = _beside(folder, "before")
    if before.exists() and not folder.exists():
        before.rename(folder)


def _carry_over(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if path.is_symlink() or path.is_file():
            if not os.path.lexists(new / path.name):
                _link(path, new / path.name)
        elif path.is_dir() and not (new / path.name).exists():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, destination, follow_symlinks=False)


def _swap(folder: Path, partial: Path, before: Path) -> None:
    """Exchange them in one step where the system can, else in two, which `restore` can undo."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(folder), os.fsencode(partial)
    if exchange is None or exchange(_AT_CWD, names[0], _AT_CWD, names[1], _SWAP) != 0:
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
        partial.rename(folder)


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")
