"""The folder of a run: records are appended as they come, so that a killed run resumes."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec.common.files import append, close_durably, disk_trouble, parse_line, replace_file
from specdec.engine.metrics import StepRecord

Key = tuple[int, int, str]  # repeat, call, arm


@dataclass(frozen=True)
class Run:
    """One prompt decoded once by one arm.

    Attributes:
        tokens: emitted ids, cut after the first end-of-sequence token, counted alike in all arms.
        num_first: tokens of the first chunk, which the decode speed leaves out.
        ttft_s: seconds to the first chunk.
        decode_s: seconds from the first chunk to the last.
        records: verify steps; empty for transformers' arms.
    """

    tokens: list[int]
    num_first: int
    ttft_s: float
    decode_s: float
    records: list[StepRecord] = field(default_factory=list)


Table = list[list[Run | None]]  # [prompt][repeat]; None where it failed


@dataclass(frozen=True)
class Memory:
    """Memory as a batch left it.

    Attributes:
        peak_rss_bytes: largest resident size of the process so far.
        peak_device_bytes: most that was allocated on the CUDA device during the batch, the models
            of all arms included; None on a CPU.
        cache_bytes: keys and values of all rows in the target's cache; None for transformers' own.
    """

    peak_rss_bytes: int
    peak_device_bytes: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Outcome:
    """What one call gave.

    Attributes:
        rows: a run for each prompt, or the reason why there is none.
        wall_s: seconds of the whole call, prefills included; None if a prompt failed.
        memory: see `Memory`.
    """

    rows: list[Run | str]
    wall_s: float | None
    memory: Memory

    @property
    def runs(self) -> list[Run]:
        """Of the prompts that did not fail."""
        return [row for row in self.rows if isinstance(row, Run)]


RECORDS = "records.jsonl"
SHARDS = "shards"


@dataclass(frozen=True)
class Records:
    """One file of records.

    Attributes:
        done: what each finished call gave.
        kept: its lines without those of calls that were not finished.
        is_whole: whether nothing had to be left out.
    """

    done: dict[Key, Outcome] = field(default_factory=dict)
    kept: list[bytes] = field(default_factory=list)
    is_whole: bool = True


def read_run(folder: Path, fingerprint: str) -> dict[Key, Outcome]:
    """Every finished call of a run, whichever process decoded it.

    Raises:
        ValueError: the folder holds results of another configuration.
    """
    done: dict[Key, Outcome] = {}
    for path in [folder / RECORDS, *sorted((folder / SHARDS).glob("records-*.jsonl"))]:
        if path.exists():
            done.update(read_records(path, fingerprint, folder).done)
    return done


def read_records(path: Path, fingerprint: str, folder: Path) -> Records:
    """Read one file of a run.

    Args:
        path: the file.
        fingerprint: of the configuration; a file of another one is refused.
        folder: of the run, for messages.

    Raises:
        ValueError: the file holds results of another configuration.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    found: dict[Key, list[tuple[bytes, StepRecord]]] = {}
    done: dict[Key, Outcome] = {}
    kept: list[bytes] = []
    written_by = None
    for line in lines:
        row = parse_line(line)
        # A line that is whole and says something else is one more that is damaged.
        with suppress(KeyError, TypeError, AttributeError, IndexError, StopIteration):
            kind = row.pop("kind")
            if kind == "run":
                written_by = row["config_fingerprint"]
                kept.append(line)
            elif kind == "step":
                found.setdefault(_take_key(row), []).append((line, StepRecord(**row)))
            elif kind == "call":
                _check_origin(written_by, fingerprint, folder)
                key = _take_key(row)
                steps = found.pop(key, [])
                if len(steps) == row["num_steps"]:
                    done[key] = _outcome(row, [record for _, record in steps])
                    kept += [*(line for line, _ in steps), line]
    # Nothing is kept of a run that finished no call: its folder serves any configuration.
    kept = kept if done else []
    return Records(done, kept, kept == lines)


def _check_origin(written_by: str | None, fingerprint: str, folder: Path) -> None:
    if written_by != fingerprint:
        raise ValueError(
            f"{str(folder)!r} holds results of another configuration or of other "
            f"prompts ({written_by or 'its first line is damaged'}, not {fingerprint}); choose "
            "another --out folder or remove this one"
        )


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
