"""What `records.jsonl` holds: a line a step ("kind": "step"), and one a finished call ("call").

A call counts when its line and those of all its steps are whole.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.bench.outcome import Key, Memory, Outcome, Run
from specdec.files import parse_line
from specdec.metrics import StepRecord

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
