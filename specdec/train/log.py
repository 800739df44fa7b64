"""`log.jsonl`: what a run measured, a line a step and a line an evaluation."""

import json
from pathlib import Path
from typing import Any

from specdec.files import append, close_durably, parse_line, replace_file


class TrainLog:
    """The log of a run. Lines behind the step that a run resumes from are dropped.

    Args:
        path: of the file; made if it is not there.
        step: that the run resumes from, 0 for a new one.
        is_writer: only one process of several writes; the others keep their records in memory.
    """

    def __init__(self, path: Path, step: int, is_writer: bool = True) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = map(parse_line, lines)
        self.records = [record for record in found if 0 < record.get("step", 0) <= step]
        self._file, self._folder = None, path.parent
        if is_writer:
            kept = "".join(json.dumps(record) + "\n" for record in self.records)
            replace_file(path, kept.encode())
            self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which has "kind" and "step"; it outlives the process at once.

        Raises:
            OSError: it could not be written, in words.
        """
        self.records.append(record)
        if self._file:
            append(self._file, json.dumps(record) + "\n", self._folder)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest record of a kind."""
        return next((each for each in reversed(self.records) if each["kind"] == kind), None)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            close_durably(self._file)
