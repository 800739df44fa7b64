"""The folder of a run: records are appended as they come, so that a killed run resumes."""

import errno
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.outcome import Key, Memory, Outcome, Run
from specdec.metrics import StepRecord

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStore:
    """`records.jsonl`: a line a step ("kind": "step"), and one a finished call ("call").

    A call counts when its line and those of all its steps are whole. What else a killed run or a
    full disk left behind is dropped, and that call decoded again.

    Args:
        folder: made if it is not there.
        fingerprint: of the configuration; a folder of another one is refused.

    Raises:
        ValueError: the folder holds results of another configuration.
        PermissionError: it cannot be written.
        OSError: there is no space left.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / "records.jsonl"
        self.done: dict[Key, Outcome] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._read(fingerprint)
            self._file = self._path.open("a", encoding="utf-8")
            if not self._path.stat().st_size:
                self._write({"kind": "run", "config_fingerprint": fingerprint})
                self._file.flush()
        except OSError as error:
            raise _trouble(folder, error) from error

    def _read(self, fingerprint: str) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        found: dict[Key, list[tuple[bytes, StepRecord]]] = {}
        kept: list[bytes] = []
        written_by = None
        for line in lines:
            row = _parsed(line)
            kind = row.pop("kind", None)
            if kind == "run":
                written_by = row["config_fingerprint"]
                kept.append(line)
            elif kind == "step":
                found.setdefault(_take_key(row), []).append((line, StepRecord(**row)))
            elif kind == "call":
                self._check_origin(written_by, fingerprint)
                key = _take_key(row)
                steps = found.pop(key, [])
                if len(steps) == row["num_steps"]:
                    self.done[key] = _outcome(row, [record for _, record in steps])
                    kept += [*(line for line, _ in steps), line]
        # Nothing is kept of a run that finished no call: its folder serves any configuration.
        if not self.done:
            kept = []
        if kept != lines:
            replace_file(self._path, b"".join(kept))

    def _check_origin(self, written_by: str | None, fingerprint: str) -> None:
        if written_by != fingerprint:
            raise ValueError(
                f"{str(self._path.parent)!r} holds results of another configuration or of other "
                f"prompts ({written_by or 'its first line is damaged'}, not {fingerprint}); choose "
                "another --out folder or remove this one"
            )

    def add(self, key: Key, outcome: Outcome) -> None:
        """Store a finished call of one arm.

        Raises:
            OSError: it could not be written; what was added before is kept.
        """
        where = {"repeat": key[0], "call": key[1], "arm": key[2]}
        records = [record for run in outcome.runs for record in run.records]
        brief = [
            {"error": row}
            if isinstance(row, str)
            else {name: value for name, value in vars(row).items() if name != "records"}
            for row in outcome.rows
        ]
        call = {
            "num_steps": len(records),
            "rows": brief,
            "wall_s": outcome.wall_s,
            "memory": asdict(outcome.memory),
        }
        try:
            for record in records:
                self._write({"kind": "step", **where, **asdict(record)})
            self._write({"kind": "call", **where, **call})
            self._file.flush()
        except OSError as error:
            raise _trouble(self._path.parent, error) from error
        self.done[key] = outcome

    def close(self) -> None:
        """Close the file; what was added is on disk already."""
        # What a full disk refused is flushed once more here, and `add` has complained already.
        with suppress(OSError):
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: what was there stays until the new one is complete.

    Raises:
        PermissionError: the folder cannot be written.
        OSError: there is no space left.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise _trouble(path.parent, error) from error


def _trouble(folder: Path, error: OSError) -> OSError:
    """The error in words; one that has been put in words already stays."""
    if error.errno is None:
        return error
    if error.errno in _NO_SPACE:
        return OSError(
            f"no space left in {str(folder)!r} ({error.strerror}); finished calls are kept in "
            "records.jsonl: make room and give the same command again"
        )
    return PermissionError(
        f"the output folder {str(folder)!r} cannot be written ({error.strerror}); choose another "
        "one with --out"
    )


def _parsed(line: bytes) -> dict[str, Any]:
    """The row of a line; nothing for one that is damaged or was never finished."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _take_key(row: dict[str, Any]) -> Key:
    return row.pop("repeat"), row.pop("call"), row.pop("arm")


def _outcome(row: dict[str, Any], steps: list[StepRecord]) -> Outcome:
    """Give the steps back to their prompts, which stand in the same order."""
    groups: list[list[StepRecord]] = []
    for record in steps:
        if record.step == 0:
            groups.append([])
        groups[-1].append(record)
    remaining = iter(groups)
    rows: list[Run | str] = []
    for brief in row["rows"]:
        if "error" in brief:
            rows.append(brief["error"])
        else:
            has_steps = bool(steps) and len(brief["tokens"]) > 1
            rows.append(Run(**brief, records=next(remaining) if has_steps else []))
    return Outcome(rows, row["wall_s"], Memory(**row["memory"]))
