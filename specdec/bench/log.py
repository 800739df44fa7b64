"""The performance log: a line for every bench on this machine, to be drawn over time."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from specdec.bench.results import Record, Results, fastest_plain, over_fastest
from specdec.bench.summary import places
from specdec.bench.workloads import fingerprint_of
from specdec.common.provenance import CodeProvenance


class LogEntry(Record):
    """A line of the log; benches with the same `setting` may be compared."""

    date: str
    versions: dict[str, str]
    version: str
    """specdec's own, and its commit"""
    machine: str
    setting: str
    """fingerprint of the configuration without arms, and of the machine"""
    label: str
    arms: list[dict[str, Any]]
    """name, tokens_per_s, tau and times plain of each, in a suite of each in a group"""
    target: str | None = None
    prompts: int | None = None
    load: str | None = None


class Log(Results):
    """Lines of a log, as they were read now."""

    schema_: Literal["specdec-log-1"] = Field(default="specdec-log-1", alias="schema")
    provenance: CodeProvenance
    entries: list[LogEntry]


def log_path() -> Path | None:
    """SPECDEC_LOG, which "off" turns off, or a file among the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    given = os.environ.get("SPECDEC_LOG", f"{state}/specdec/bench.jsonl")
    return None if given in ("", "0", "off") else Path(given).expanduser()


def log_results(results: Any) -> None:
    """Append a line; a log that cannot be written is a warning, and fails no bench."""
    path = log_path()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # at once, so that other benches may write too
            file.write(f"{entry_of(results).model_dump_json()}\n".encode())
    except OSError as error:
        warnings.warn(f"nothing was added to the log: {error}; SPECDEC_LOG=off", stacklevel=2)


def entry_of(results: Any) -> LogEntry:
    """Make the line of a bench, a suite or a bake-off."""
    where = results.provenance
    run = where.config.model_dump(mode="json")
    run = {k: v for k, v in run.get("run", run).items() if k != "arms"}
    machine = f"{where.device}, {where.cpu}, {where.threads} threads"
    baseline = getattr(results, "baseline", None)  # of a bake-off
    names = [Path(run[key][part]).name for key, part in (("target", "path"), ("prompts", "source"))]
    return LogEntry(
        date=where.date,
        versions=where.versions,
        version=f"{where.versions['specdec']} {(where.git_commit or '')[:7]}".strip(),
        machine=machine,
        setting=fingerprint_of([run, machine]),
        label=f"{run.get('suite', 'bench')} of {', '.join(names)}",
        arms=[
            {
                **{"name": arm.name + place, "over": (baseline or fastest_plain(arms)) + place},
                **{"tokens_per_s": arm.decode_tokens_per_s, "tau": arm.tau},
                **over_fastest(fastest_plain(arms), arm),
            }
            for place, arms in places(results)
            for arm in arms
        ],
        target=names[0],
        prompts=sum(getattr(arms[0], f"{results.NOUN}s") for _, arms in places(results)),
        load=where.alarms[0] if where.alarms else f"{where.load_average:.1f}",
    )
