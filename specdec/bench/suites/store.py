"""The folder of a suite: a line a finished call, so that a killed run resumes."""

import json
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from specdec.bench.outcome import Key, Memory
from specdec.bench.suites.served import Call, Power, Served
from specdec.files import append, close_durably, parse_line, replace_file
from specdec.metrics import StepRecord

RECORDS = "suite-records.jsonl"
_STEP_KEYS = tuple(field.name for field in fields(StepRecord))


class SuiteStore:
    """`suite-records.jsonl`: the fingerprint first, then a line a finished call of one arm.

    What a killed run or a full disk left of a line is dropped, and that call served again.

    Args:
        folder: made if it is not there.
        fingerprint: of configuration and requests; a folder of another one is refused.

    Attributes:
        done: what each finished call gave.

    Raises:
        ValueError: the folder holds results of another configuration.
        OSError: it cannot be written, or is full.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._path = folder, folder / RECORDS
        self.done: dict[Key, Call] = {}
        folder.mkdir(parents=True, exist_ok=True)
        first = {"kind": "suite", "config_fingerprint": fingerprint}
        lines = [json.dumps(first).encode() + b"\n"]
        if self._path.exists():
            lines = self._read(lines[0])
        replace_file(self._path, b"".join(lines))
        self._file = self._path.open("a", encoding="utf-8")

    def _read(self, first: bytes) -> list[bytes]:
        """The lines to keep; nothing of a run that finished no call."""
        head, *rows = self._path.read_bytes().splitlines(keepends=True) or [b""]
        kept = [first]
        for line in rows:
            row = parse_line(line)
            # A line that is whole and says something else is one more that is damaged.
            with suppress(KeyError, TypeError, AttributeError, ValueError):
                self.done[(row["repeat"], row["call"], row["arm"])] = _call(row)
                kept.append(line)
        if self.done and head != first:
            raise ValueError(
                f"{str(self._folder)!r} holds results of another configuration or of other "
                "prompts; choose another --out folder or remove this one"
            )
        return kept

    def add(self, key: Key, call: Call) -> None:
        """Store a finished call of one arm.

        Raises:
            OSError: it could not be written; what was added before is kept.
        """
        repeat, number, arm = key
        line = {
            "kind": "call",
            "repeat": repeat,
            "call": number,
            "arm": arm,
            "wall_s": call.wall_s,
            "memory": asdict(call.memory),
            "power": asdict(call.power),
            "rows": [_brief(row) for row in call.rows],
        }
        append(self._file, json.dumps(line) + "\n", self._folder)
        self.done[key] = call

    def close(self) -> None:
        """Close the file, and wait until what was added is on the disk."""
        close_durably(self._file)


def _brief(row: Served | str) -> dict[str, Any]:
    """A request with its steps as columns, which take a third of the space of rows."""
    if isinstance(row, str):
        return {"error": row}
    steps = {key: [getattr(record, key) for record in row.records] for key in _STEP_KEYS}
    return {**{k: v for k, v in vars(row).items() if k != "records"}, "steps": steps}


def _call(row: dict[str, Any]) -> Call:
    rows = [_served(each) for each in row["rows"]]
    return Call(rows, row["wall_s"], Memory(**row["memory"]), Power(**row["power"]))


def _served(row: dict[str, Any]) -> Served | str:
    if "error" in row:
        return str(row["error"])
    columns = row.pop("steps")
    values = zip(*(columns[key] for key in _STEP_KEYS), strict=True)
    return Served(
        **row, records=[StepRecord(**dict(zip(_STEP_KEYS, v, strict=True))) for v in values]
    )
