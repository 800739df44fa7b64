"""The folder of a suite: a line a finished call, so that a killed run resumes."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdec.bench.store import Key, Memory, Run
from specdec.common.files import append, close_durably, parse_line, replace_file
from specdec.engine.metrics import StepRecord


@dataclass(frozen=True)
class Served:
    """A request as its user saw it; times are seconds after the call's start.

    Attributes:
        tokens: emitted ids.
        sent_s: when it was sent.
        queue_s: seconds until its prefill began.
        chunk_s: when each chunk came.
        chunk_tokens: tokens of each chunk.
        records: verify steps.
    """

    tokens: list[int]
    sent_s: float
    queue_s: float
    chunk_s: list[float]
    chunk_tokens: list[int]
    records: list[StepRecord] = field(default_factory=list)

    @property
    def end_s(self) -> float:
        """When the last chunk came."""
        return self.chunk_s[-1]

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in pairwise(self.chunk_s)]

    @property
    def run(self) -> Run:
        """The request as a bench's run: its time to the first token holds the queue."""
        first_s = self.chunk_s[0]
        return Run(
            self.tokens,
            self.chunk_tokens[0],
            first_s - self.sent_s,
            self.end_s - first_s,
            self.records,
        )


@dataclass(frozen=True)
class Power:
    """What a device drew during a call; None where it was not measured.

    Attributes:
        energy_j: joules of the whole device, other processes on it included.
        power_w: the same over the call's seconds.
    """

    energy_j: float | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class Call:
    """Requests that were served together.

    Attributes:
        rows: what each request gave, in their order, or the reason why it failed.
        wall_s: seconds from the start to the last chunk; None if a request failed.
        memory: while they were served.
        power: while they were served.
    """

    rows: list[Served | str]
    wall_s: float | None
    memory: Memory
    power: Power

    @property
    def served(self) -> Sequence[Served]:
        """The requests that did not fail."""
        return [row for row in self.rows if isinstance(row, Served)]


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
