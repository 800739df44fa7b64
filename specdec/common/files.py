"""Files and folders that are there whole or not at all, and folders that one run has to itself."""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from specdec.checkpoints.identity import TARGET, check_resumed

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK = ".lock"
_AT_CWD, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text whose objects hold no key twice.

    Raises:
        ValueError: it is no such text.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """The object of a JSON line; nothing for one that is damaged or was never finished."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def disk_trouble(folder: Path, error: OSError) -> OSError:
    """The error in words; one that has been put in words already stays."""
    if error.errno is None:
        return error
    if error.errno in NO_SPACE:
        return OSError(
            f"no space left in {str(folder)!r} ({error.strerror}): the disk is full; what was "
            "finished is kept: make room and give the same command again"
        )
    if error.errno == errno.ENOENT:
        return FileNotFoundError(
            f"the output folder {str(folder)!r}, or a file in it, was removed during the run; give "
            "the same command again, or choose another one with --out"
        )
    return PermissionError(
        f"the output folder {str(folder)!r} cannot be written ({error.strerror}); choose another "
        "one with --out"
    )


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone."""
    for each in [*reversed(folder.parents), folder]:
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def private_opener(path: str, flags: int) -> int:
    """Open a file for its owner alone; an `opener` of `open`."""
    opened = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    os.fchmod(opened, 0o600)  # it may have been there before
    return opened


@contextmanager
def locked(folder: Path, file: Path | None = None, *, is_writer: bool = True) -> Iterator[None]:
    """Have a folder to oneself; it is made if it is not there, and goes again if it stays empty.

    Args:
        folder: that is written to.
        file: to lock in place of one in the folder, for a folder that is replaced.
        is_writer: of several processes of one run only one takes the lock.

    Raises:
        ValueError: another run has it.
        OSError: it cannot be written.
    """
    if not is_writer:
        yield
        return
    import fcntl

    path = file or folder.expanduser() / _LOCK
    is_new = not path.parent.exists()
    try:
        if file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:  # a collection's, which is its owner's alone
            make_private(path.parent)
        opened = path.open("a")
    except OSError as error:
        raise disk_trouble(path.parent, error) from error
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _require_linked(opened)  # or a run that ends just now has removed it
        except (BlockingIOError, FileNotFoundError) as error:
            raise another_run(folder) from error
        try:
            yield
        finally:
            with suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                    path.unlink()
                    if is_new:
                        path.parent.rmdir()  # if nothing was written


def append(file: IO[Any], content: str | bytes, folder: Path) -> None:
    """Add to a file of `folder`; a killed process loses nothing of it. Errors are in words."""
    try:
        file.write(content)
        file.flush()
        _require_linked(file)
    except OSError as error:
        raise disk_trouble(folder, error) from error


def close_durably(file: IO[Any]) -> None:
    """Close a file, and wait until what was added is on the disk."""
    # What a full disk refused is flushed once more here, and `append` has complained already.
    with suppress(OSError):
        os.fsync(file.fileno())
    with suppress(OSError):
        file.close()


def _require_linked(file: IO[Any]) -> None:
    """Refuse to go on with a file that was removed: writing to it would tell nothing."""
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def another_run(folder: Path) -> ValueError:
    """The error of a folder that is taken."""
    return ValueError(
        f"another run is writing to {str(folder)!r}; wait for it or choose another --out folder"
    )


def write_durably(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file under another name, wait until it is on the disk, then name it.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb", opener=private_opener if private else None) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def replace_file(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file as `write_durably`, with errors in words."""
    try:
        write_durably(path, content, private)
    except OSError as error:
        raise disk_trouble(path.parent, error) from error


@contextmanager
def whole_folder(folder: Path, *, private: bool = False) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `folder` when the block ends well.

    Until then, and after a crash, what stood there before stays. Files and folders in it that the
    new one does not have are carried over. A link stays a link: the folder behind it is replaced.

    Raises:
        OSError: it cannot be written; nothing is left of what was.
    """
    folder = folder.resolve()
    partial, before = _beside(folder, "partial"), _beside(folder, "before")
    try:
        restore(folder)
        if folder.exists() and (folder.is_mount() or not folder.is_dir()):
            what = "mount point" if folder.is_mount() else "file"
            raise OSError(errno.EBUSY, f"it is a {what}; give a folder in its place, or in it")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
        if private:
            make_private(partial)
        else:
            partial.mkdir(parents=True)
        yield partial
        for path in [partial, *partial.rglob("*")]:
            if private:
                path.chmod(0o700 if path.is_dir() else 0o600)
            sync(path)
        if folder.exists():
            _carry_over(folder, partial)
            if not private:
                shutil.copymode(folder, partial)
            _swap(folder, partial, before)
        else:
            partial.rename(folder)
        sync(folder.parent)
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


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last; only Linux and macOS can and need to."""
    if os.name == "posix":
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


class Journal:
    """What a run has finished so far; the first line says which run it is.

    Every line is on its way to the disk when `append` returns: a killed process loses nothing, a
    machine that loses its power at most what its own system had not written. A line that a killed
    process left torn is cut off, one in between that cannot be read is passed over.

    Args:
        path: of the file; its folder is made.
        identity: facts that make a run the same run, JSON values.

    Attributes:
        path: of the file.
        entries: what earlier runs appended, in order; whoever has read them may clear them.

    Raises:
        ValueError: the file belongs to another run, which is told by the first fact that differs,
            or another process writes to it.
        PermissionError: the folder cannot be written.
        OSError: there is no space left.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        try:
            make_private(path.parent)
            self._file = open(path, "a+b", opener=private_opener)  # noqa: SIM115
        except OSError as error:
            raise disk_trouble(path.parent, error) from error
        try:
            self._begin(identity)
        except OSError as error:
            self.close()
            raise disk_trouble(path.parent, error) from error
        except ValueError:
            self.close()
            raise

    def _begin(self, identity: dict[str, Any]) -> None:
        self._lock()
        self._read(identity)
        if not self.entries:
            # Nothing is kept of a run that got nowhere: its folder serves any other.
            self._file.truncate(0)
            self._file.write(_line({"run": identity}))
            self._file.flush()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise another_run(self.path.parent) from error

    def _read(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        header: dict[str, Any] | None = None
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            row = parse_line(line)
            if number == 0:
                header = row.get("run")
            elif row:
                self.entries.append(row)
        self._file.truncate(whole)
        if self.entries:
            self._check_identity(header, identity)

    def _check_identity(self, found: dict[str, Any] | None, identity: dict[str, Any]) -> None:
        where = f"{str(self.path.parent)!r} holds answers of another run"
        fix = "choose another --out folder or remove this one"
        if found is None:
            raise ValueError(f"{where}: the first line of {self.path.name} is damaged; {fix}")
        for key in sorted(found.keys() | identity.keys()):
            theirs, ours = found.get(key), identity.get(key)
            if key == TARGET:
                check_resumed(self.path.parent, theirs, ours)
            elif theirs != ours:
                raise ValueError(f"{where}: {key} is {theirs!r} there, not {ours!r}; {fix}")

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it could not be written; what was added before is kept.
        """
        append(self._file, _line(row), self.path.parent)

    def close(self) -> None:
        """Close the file and let others write to it."""
        close_durably(self._file)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
