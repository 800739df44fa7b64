"""Brings exchanges to the disk, without ever standing in the way of serving."""

import asyncio
import errno
import fcntl
import json
import os
import random
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from specdec.common.files import make_private
from specdec.proxy.allowed import REQUEST, RESPONSE, kept
from specdec.proxy.exchange import Budget, Exchange, Headers, Settings, Skip
from specdec.proxy.redaction import redact, secrets_inside


def encode(exchange: Exchange, secrets: frozenset[str]) -> bytes | None:
    """One line of JSON in ASCII with its line end; None if the request is no JSON object.

    Args:
        exchange: that is sealed.
        secrets: texts to be redacted besides the exchange's own credentials.
    """
    request = _request(exchange.request)
    if request is None:
        return None
    response, is_whole = exchange.answer.response() if exchange.answer else (None, False)
    # Of what is not kept, too: the answer may repeat it.
    model = _model(request, response)
    hidden = (secrets | exchange.secrets | secrets_inside(request)) - {model or ""}
    record = {
        "id": exchange.id,
        "time": exchange.time,
        "path": _endpoint(exchange.path),
        "model": model,
        "request": kept(request, REQUEST),
        "response": None if response is None else kept(response, RESPONSE),
        "status": exchange.status,
        "complete": is_whole and (exchange.ended or exchange.has_answer),
        "stream": exchange.is_stream,
        "latency_s": round(exchange.latency_s, 6),
        "ttft_s": None if exchange.ttft_s is None else round(exchange.ttft_s, 6),
    }
    # NaN is no JSON, and readers of the file would stumble over it.
    line = json.dumps(redact(record, hidden), allow_nan=False, separators=(",", ":"))
    return line.encode("ascii") + b"\n"


def _endpoint(path: str) -> str:
    """The path without its prefix, which may name a team or hold a key."""
    found = re.search(r"(/v1)?(/chat)?/completions/?$", path)
    return found[0] if found else ""


def _request(body: bytearray) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _model(request: dict[str, Any], response: dict[str, Any] | None) -> str | None:
    """The name that the request asked for, else the one that answered."""
    named = (request.get("model"), (response or {}).get("model"))
    return next((name for name in named if isinstance(name, str) and name), None)


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


class Recorder:
    """Writes one record after the other in a thread of its own.

    Its state changes in the event loop's thread alone.

    Args:
        settings: of the recording.
        files: to write to.
        secrets: texts that no record may hold, besides each request's own credentials.
        say: takes what the operator has to know, a line at a time.
        chance: decides which requests are sampled.

    Attributes:
        recorded: records on the disk, written by this process.
        trouble: why nothing is recorded now; empty while it is.
        last_error: the last thing that went wrong; empty if nothing did.
    """

    def __init__(
        self,
        settings: Settings,
        files: RecordFiles,
        secrets: frozenset[str],
        say: Callable[[str], None],
        chance: random.Random | None = None,
    ) -> None:
        self.budget = Budget(settings.max_body_bytes, settings.max_held_bytes)
        self.recorded = 0
        self.trouble = ""
        self.last_error = ""
        self._settings = settings
        self._files = files
        self._secrets = secrets
        self._say = say
        self._chance = chance or random.Random()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: dict[str, asyncio.Future[Skip | None]] = {}

    def begin(self, method: str, path: str, headers: Headers, query: bytes) -> Exchange:
        """An exchange that is open if this request is to be recorded."""
        exchange = Exchange(path, headers, query, self.budget)
        if method != "POST" or not is_recorded(path):
            exchange.release()
        elif self._chance.random() >= self._settings.sample:
            exchange.skip(Skip.NOT_SAMPLED)
        return exchange

    async def keep(self, exchange: Exchange) -> None:
        """Record the exchange as it is now, once; wait for the disk, but not for ever."""
        if exchange.is_open:
            exchange.seal()
            loop = asyncio.get_running_loop()
            writing = loop.run_in_executor(self._thread, self._write, exchange)
            self._pending[exchange.id] = writing
            writing.add_done_callback(lambda done: self._written(exchange, done))
        if exchange.id in self._pending:
            # A disk that hangs must not hang the client.
            await asyncio.wait([self._pending[exchange.id]], timeout=self._settings.max_wait_s)

    async def close(self) -> None:
        """Write what is waiting, and give the folder free."""
        if self._pending:
            await asyncio.wait(list(self._pending.values()))
        self._thread.shutdown()
        self._files.close()

    @property
    def file_name(self) -> str:
        """The file that is written to."""
        return self._files.path.name

    @property
    def total_bytes(self) -> int:
        """Bytes of all records in the folder."""
        return self._files.total_bytes

    def _write(self, exchange: Exchange) -> Skip | None:
        """In the recorder's thread: the parts that take time."""
        line = encode(exchange, self._secrets)
        if line is None:
            return Skip.NOT_JSON
        self._files.append(line)
        return None

    def _written(self, exchange: Exchange, done: "asyncio.Future[Skip | None]") -> None:
        del self._pending[exchange.id]
        exchange.release()
        error = done.exception()
        if isinstance(error, TotalReachedError):
            self._lose(Skip.MAX_TOTAL, f"{self._settings.max_total_bytes} bytes are on the disk")
        elif isinstance(error, OSError):
            self._lose(Skip.DISK, str(error))
        elif error is not None:
            # Whatever a request may hold, it is served; a fault in recording it is counted.
            self.budget.skipped[Skip.FAULT] += 1
            # Without its text, which may quote the request.
            self._note(f"a request could not be recorded: {type(error).__name__}")
        elif (skip := done.result()) is not None:
            self.budget.skipped[skip] += 1
        else:
            self.recorded += 1
            self._regain()

    def _lose(self, reason: Skip, detail: str) -> None:
        self.budget.skipped[reason] += 1
        if self.trouble != f"{reason}: {detail}":
            self.trouble = f"{reason}: {detail}"
            self._note(f"recording stopped ({self.trouble}); requests are served all the same")

    def _regain(self) -> None:
        if self.trouble:
            self.trouble = ""
            self._say("recording goes on")

    def _note(self, text: str) -> None:
        self.last_error = text
        self._say(text)


def is_recorded(path: str) -> bool:
    """Whether it is the path of chat completions or of completions, with or without a prefix."""
    return path.rstrip("/").endswith("/completions")
