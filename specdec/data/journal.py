"""An append-only file of JSON lines, which a killed run leaves readable."""

import json
from pathlib import Path
from typing import Any

from specdec.checkpoints.identity import TARGET, check_resumed
from specdec.files import (
    another_run,
    append,
    close_durably,
    disk_trouble,
    make_private,
    parse_line,
    private_opener,
)


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
