"""Numbered files of lines that survive a kill, a full disk and being moved away."""

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from specdec.files import make_private

_NAME = re.compile(r"requests-(\d{5,})\.jsonl")
_BLOCK = 65536


class TotalReachedError(Exception):
    """The folder holds as much as it may."""


class RecordFiles:
    """`requests-00001.jsonl` and so on; a line that `append` returned for is on the disk.

    Not for several threads at once. One process at a time holds the folder.

    Args:
        folder: made, for its owner alone, if it is not there.
        max_file_bytes: a file that would grow beyond it is followed by the next one.
        max_total_bytes: of all files together.
        write: `os.write`, or what a test puts in its place.

    Raises:
        ValueError: another proxy records into the folder.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        max_file_bytes: int,
        max_total_bytes: int,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._write = write
        self._fd: int | None = None
        self._size = 0
        make_private(folder)
        self._lock_fd = _locked(folder)
        self._number = max(self._numbers(), default=1)
        if os.path.lexists(self.path):
            _heal(self.path)
        self.total_bytes = self._count_total()

    @property
    def path(self) -> Path:
        """The file that the next line goes to, unless it is full."""
        return self._folder / f"requests-{self._number:05d}.jsonl"

    def append(self, line: bytes) -> None:
        """Write a whole line, and return when it is on the disk.

        Raises:
            TotalReachedError: the files hold as much as they may.
            OSError: the line is not written, or not surely; the next call tries afresh.
        """
        if self.total_bytes + len(line) > self._max_total_bytes:
            self.total_bytes = self._count_total()  # somebody may have taken files away
            if self.total_bytes + len(line) > self._max_total_bytes:
                raise TotalReachedError
        try:
            self._append(self._opened(len(line)), line)
        except OSError:
            self._close()  # opening it again heals what is torn
            raise
        self._size += len(line)
        self.total_bytes += len(line)

    def close(self) -> None:
        """Give the folder free."""
        self._close()
        os.close(self._lock_fd)

    def _append(self, fd: int, line: bytes) -> None:
        try:
            # One call for the line: what a kill interrupts is its end, never its middle.
            written = self._write(fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes fitted", self.path)
            os.fsync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, self._size)
            raise

    def _opened(self, num_bytes: int) -> int:
        """The file for a line of so many bytes."""
        if self._fd is not None and not self._is_in_place(self._fd):
            self._next()
        if self._fd is None:
            self._open()
        if self._size and self._size + num_bytes > self._max_file_bytes:
            self._next()
            self._open()
        assert self._fd is not None
        return self._fd

    def _is_in_place(self, fd: int) -> bool:
        """Whether the open file is still what its path names; else lines would go with it."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _next(self) -> None:
        self._close()
        self._number = max([self._number, *self._numbers()]) + 1

    def _open(self) -> None:
        if os.path.lexists(self.path):
            _heal(self.path)
        fd = _opened_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._fd, self._size = fd, os.fstat(fd).st_size
        _sync_folder(self._folder)

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(entry.name) for entry in self._folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _count_total(self) -> int:
        return sum(
            entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(self._folder)
            if _NAME.fullmatch(entry.name)
        )


def _locked(folder: Path) -> int:
    """A lock that ends with this process, however it ends."""
    fd = _opened_file(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ValueError(
            f"another proxy records into {str(folder)!r}; stop it or give another --out"
        ) from error
    return fd


def _opened_file(path: Path, flags: int) -> int:
    """A file of ours for its owner alone, never what somebody put in its place.

    Raises:
        OSError: it cannot be opened, or a link, a pipe or a device stands there.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fchmod(fd, 0o600)
            return fd
        os.close(fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
    raise OSError(
        f"{str(path)!r} is a link or no regular file, and records would go elsewhere; remove "
        "it or give another --out"
    )


def _heal(path: Path) -> None:
    """Make the file end with a whole line: end the last one if it lacks only that, else drop it."""
    with open(_opened_file(path, os.O_RDWR), "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = _last_line(file.fileno(), end)
        if start == end:
            return
        tail = os.pread(file.fileno(), end - start, start)
        if _is_json(tail):
            file.write(b"\n")
        else:
            file.truncate(start)
        file.flush()
        os.fsync(file.fileno())


def _last_line(fd: int, end: int) -> int:
    """Where the bytes behind the last line end begin."""
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
