"""The performance log: a line for every bench on this machine, to be drawn over time."""

import os
import warnings
from pathlib import Path
from typing import Any

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from specdec.bench.results import Record
from specdec.bench.summary import places
from specdec.bench.workloads import fingerprint_of
from specdec.common.files import LineFile


class LoggedArm(Record):
    """One arm of a bench, or of a group of a suite."""

    name: str
    tokens_per_s: float | None
    tau: float | None


class LogEntry(Record):
    """A line of the log; benches with the same `setting` may be compared."""

    date: str
    versions: dict[str, str]
    git_commit: str | None
    machine: str
    setting: str
    """fingerprint of the configuration without arms, and of the machine"""
    label: str
    arms: list[LoggedArm]

    @property
    def version(self) -> str:
        """Version and commit of specdec."""
        return f"{self.versions.get('specdec', '')} {(self.git_commit or '')[:7]}".strip()


def log_path() -> Path | None:
    """SPECDEC_LOG, which "off" turns off, or a file among the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    given = os.environ.get("SPECDEC_LOG", f"{state}/specdec/bench.jsonl")
    return None if given in ("", "0", "off") else Path(given).expanduser()


def log_results(results: Any) -> None:
    """Append a line; a log that cannot be written is a warning, and fails no bench."""
    path, where = log_path(), results.provenance
    if path is None:
        return
    run = where.config.model_dump(mode="json")
    run = {k: v for k, v in run.get("run", run).items() if k != "arms"}
    machine = f"{where.device}, {where.cpu}, {where.threads} threads"
    source, kind = run["prompts"]["source"], run.get("suite", "bench")
    entry = LogEntry(
        date=where.date,
        versions=where.versions,
        git_commit=where.git_commit,
        machine=machine,
        setting=fingerprint_of([run, machine]),
        label=f"{kind} of {Path(run['target']['path']).name}, {Path(source).name}",
        arms=[
            LoggedArm(name=f"{arm.name}{place}", tokens_per_s=arm.decode_tokens_per_s, tau=arm.tau)
            for place, arms in places(results)
            for arm in arms
        ],
    )
    try:
        _append(path, entry)
    except (OSError, ValueError) as error:
        warnings.warn(f"nothing was added to the log: {error}; SPECDEC_LOG=off", stacklevel=2)


@retry(
    retry=retry_if_exception_type(ValueError),  # another bench is writing its line
    stop=stop_after_delay(10),
    wait=wait_fixed(0.05),
    reraise=True,
)
def _append(path: Path, entry: LogEntry) -> None:
    with LineFile(path) as file:
        file.append(entry.model_dump())
