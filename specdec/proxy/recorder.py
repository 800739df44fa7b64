"""Brings exchanges to the disk, without ever standing in the way of serving."""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from specdec.proxy.exchange import Budget, Exchange
from specdec.proxy.headers import Headers
from specdec.proxy.record import encode
from specdec.proxy.record_files import RecordFiles, TotalReachedError
from specdec.proxy.settings import Settings
from specdec.proxy.skip import Skip


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
