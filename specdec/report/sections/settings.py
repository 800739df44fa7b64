"""Where the figures come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.report.blocks import Column, Section, Table
from specdec.report.runs import Run


def settings(runs: Sequence[Run]) -> Section:
    """A column a run, a row a setting."""
    section = Section("runs", "Runs and settings")
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for each in facts for name in each))
    rows = [{"name": name, **_values(name, facts)} for name in names]
    columns = [Column("name", "setting"), *(_column(i, run) for i, run in enumerate(runs))]
    section.tables.append(Table("settings", "Provenance and settings", columns, rows))
    dirty = [run.label for run in runs if run.provenance.get("git_dirty")]
    if dirty:
        section.text.append(
            f"Run with changes that no commit holds: {', '.join(dirty)}. Nobody can repeat these "
            "figures exactly."
        )
    return section


def _column(place: int, run: Run) -> Column:
    return Column(str(place), f"{run.label} ({run.kind})")


def _values(name: str, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {str(place): each.get(name) for place, each in enumerate(facts)}


def _facts(run: Run) -> dict[str, Any]:
    where = run.provenance
    return {
        "schema": run.data["schema"],
        "date": where.get("date"),
        "commit": _commit(where),
        "command": where.get("command"),
        "target": _target(run),
        "dtype": _dtype(where),
        "device": _device(where),
        "threads": where.get("threads"),
        "load at the start": _load(where.get("load_average")),
        **_configured(run.config),
        "versions": ", ".join(f"{k} {v}" for k, v in (where.get("versions") or {}).items()) or None,
    }


def _configured(config: dict[str, Any]) -> dict[str, Any]:
    prompts, sampling = config.get("prompts"), config.get("sampling")
    return {
        "prompts": prompts and f"{prompts['num']} of {_last(prompts['source'])}",
        "sampling": sampling and _sampling(sampling),
        **{
            name.replace("_", " "): config.get(name)
            for name in ("rule", "batch_size", "max_new_tokens", "repeats", "seed")
        },
    }


def _sampling(sampling: dict[str, Any]) -> str:
    """Temperature, and what is not off."""
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    others = {k: v for k, v in sampling.items() if k != "temperature" and v != off.get(k, 0)}
    said = [f"T = {sampling.get('temperature', 0):g}", *(f"{k} {v}" for k, v in others.items())]
    return ", ".join(said)


def _commit(where: dict[str, Any]) -> str | None:
    commit = where.get("git_commit")
    return commit and commit[:12] + (" with changes" if where.get("git_dirty") else "")


def _target(run: Run) -> str | None:
    identity = run.identity or {}
    name = identity.get("name") or (run.config.get("target") or {}).get("path")
    marks = [f"{k} {identity[k][:8]}" for k in ("weights", "tokenizer") if identity.get(k)]
    return name and _last(name) + (f" ({', '.join(marks)})" if marks else "")


def _dtype(where: dict[str, Any]) -> str | None:
    dtype = where.get("dtype")
    return dtype and dtype + (", quantised" if where.get("quantized") else "")


def _device(where: dict[str, Any]) -> str | None:
    device, cpu = where.get("device"), where.get("cpu")
    said = f" ({cpu}, {where.get('cpu_count')} cores)" if cpu else ""
    return device and device + said


def _load(average: float | None) -> str | None:
    return None if average is None else f"{average:.1f}"


def _last(path: str) -> str:
    """A hub id whole; of a path its last part, for others do not share our disks."""
    return Path(path).name if path.count("/") != 1 or path[0] in "./~" else path
