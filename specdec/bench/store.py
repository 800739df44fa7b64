"""The folder of a run: records are appended as they come, so that a killed run resumes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.outcome import Key, Outcome
from specdec.bench.records import RECORDS, SHARDS, read_records, read_run
from specdec.files import append, close_durably, disk_trouble, replace_file


class RunStore:
    """Where one process adds what its calls gave; see `records.py` for the lines.

    A call counts when it is whole. What else a killed run or a full disk left behind is dropped,
    and that call decoded again.

    Args:
        folder: made if it is not there.
        fingerprint: of the configuration; a folder of another one is refused.
        shard: number of this process among several, each of which writes a file of its own; None
            for one process alone.

    Attributes:
        done: what the calls gave that are finished, those of all processes at the start included.

    Raises:
        ValueError: the folder holds results of another configuration.
        PermissionError: it cannot be written.
        OSError: there is no space left.
    """

    def __init__(self, folder: Path, fingerprint: str, shard: int | None = None) -> None:
        name = RECORDS if shard is None else f"{SHARDS}/records-{shard}.jsonl"
        self._folder, self._path = folder, folder / name
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.done = read_run(folder, fingerprint)
            if self._path.exists():
                self._repair(fingerprint)
            self._file = self._path.open("a", encoding="utf-8")
            if not self._path.stat().st_size:
                append(self._file, _line("run", config_fingerprint=fingerprint), folder)
        except OSError as error:
            raise disk_trouble(folder, error) from error

    def _repair(self, fingerprint: str) -> None:
        records = read_records(self._path, fingerprint, self._folder)
        if not records.is_whole:
            replace_file(self._path, b"".join(records.kept))

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
        lines = [_line("step", **where, **asdict(record)) for record in records]
        append(self._file, "".join(lines) + _line("call", **where, **call), self._folder)
        self.done[key] = outcome

    def close(self) -> None:
        """Close the file, and wait until what was added is on the disk."""
        close_durably(self._file)


def _line(kind: str, **row: Any) -> str:
    return json.dumps({"kind": kind, **row}) + "\n"
