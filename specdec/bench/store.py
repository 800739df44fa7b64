"""The folder of a run: records are appended as they come, so that a killed run resumes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.arms import Run
from specdec.metrics import StepRecord

Key = tuple[int, int, str]  # repeat, batch, arm


class RunStore:
    """`records.jsonl`: a line a step ("kind": "step"), and one a finished batch ("batch").

    Args:
        folder: made if it is not there.
        fingerprint: of the configuration; a folder of another one is refused.

    Raises:
        ValueError: the folder holds results of another configuration.
        PermissionError: it cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / "records.jsonl"
        self.done: dict[Key, list[Run] | str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._read(fingerprint)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise PermissionError(
                f"the output folder {str(folder)!r} cannot be written ({error.strerror}); "
                "choose another one with --out"
            ) from error
        if not self._path.stat().st_size:
            self._write({"kind": "run", "config_fingerprint": fingerprint})

    def _read(self, fingerprint: str) -> None:
        lines = _finished(self._path.read_text(encoding="utf-8").splitlines(keepends=True))
        self._path.write_text("".join(lines), encoding="utf-8")
        steps: list[StepRecord] = []
        for line in lines:
            row = json.loads(line)
            kind = row.pop("kind")
            if kind == "run" and row["config_fingerprint"] != fingerprint:
                raise ValueError(
                    f"{self._path.parent} holds results of another configuration "
                    f"({row['config_fingerprint']}, not {fingerprint}); choose another --out "
                    "folder or remove this one"
                )
            if kind == "step":
                row = {k: v for k, v in row.items() if k not in ("repeat", "batch", "arm")}
                steps.append(StepRecord(**row))
            if kind == "batch":
                key = (row["repeat"], row["batch"], row["arm"])
                self.done[key] = row["error"] or _runs(row["runs"], steps)
                steps = []

    def add(self, key: Key, outcome: list[Run] | str) -> None:
        """Store a finished batch of one arm, or the error that ended it."""
        self.done[key] = outcome
        where = {"repeat": key[0], "batch": key[1], "arm": key[2]}
        runs = [] if isinstance(outcome, str) else outcome
        for run in runs:
            for record in run.records:
                self._write({"kind": "step", **where, **asdict(record)})
        brief = [{k: v for k, v in vars(run).items() if k != "records"} for run in runs]
        error = outcome if isinstance(outcome, str) else None
        self._write({"kind": "batch", **where, "error": error, "runs": brief})
        self._file.flush()

    def close(self) -> None:
        """Close the file; what was added is on disk already."""
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def _finished(lines: list[str]) -> list[str]:
    """Lines up to the last finished batch: a killed run may leave some steps of the next one.

    Nothing is kept of a run that finished no batch, so that its folder serves any configuration.
    """
    ends = [
        i + 1
        for i, line in enumerate(lines)
        if line.startswith('{"kind": "batch"') and line.endswith("}\n")
    ]
    return lines[: ends[-1]] if ends else []


def _runs(rows: list[dict[str, Any]], steps: list[StepRecord]) -> list[Run]:
    """Give the steps back to their prompts, which stand in the same order."""
    groups: list[list[StepRecord]] = []
    for record in steps:
        if record.step == 0:
            groups.append([])
        groups[-1].append(record)
    remaining = iter(groups)
    runs = []
    for row in rows:
        has_steps = bool(steps) and len(row["tokens"]) > 1
        runs.append(Run(**row, records=next(remaining) if has_steps else []))
    return runs
