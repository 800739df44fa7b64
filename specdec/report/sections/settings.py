"""Section of provenance and settings."""

from collections.abc import Sequence
from typing import Any

from specdec.report.document import Section
from specdec.report.runs import Run, last_part
from specdec.report.tables import Column


def add_settings(section: Section, runs: Sequence[Run]) -> None:
    """Show provenance and settings: a column a run, a row a setting."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    columns = [Column(str(n), f"{run.label} ({run.kind})") for n, run in enumerate(runs)]
    rows = [
        {"name": name, **{str(n): each.get(name) for n, each in enumerate(facts)}} for name in names
    ]
    columns.insert(0, Column("name", "setting"))
    section.tabulate("settings", "Provenance and settings", columns, rows)
    dirty = [run.label for run in runs if run.provenance.get("git_dirty")]
    if dirty:
        section.text.append(
            f"Run with changes that no commit holds: {', '.join(dirty)}. Nobody can repeat these "
            "figures exactly."
        )


def _facts(run: Run) -> dict[str, Any]:
    where, config, identity = run.provenance, run.config, run.identity or {}
    prompts, sampling = config.get("prompts"), config.get("sampling")
    marks = [f"{key} {identity[key][:8]}" for key in ("weights", "tokenizer") if identity.get(key)]
    name = identity.get("name") or (config.get("target") or {}).get("path")
    cpu = where.get("cpu") and f"{where['cpu']}, {where.get('cpu_count')} cores"
    commit = (where.get("git_commit") or "")[:12]
    load = where.get("load_average")
    keys = ("rule", "batch_size", "max_new_tokens", "repeats", "seed")
    return {
        "schema": run.data.schema_,
        "date": where.get("date"),
        "commit": _noted(commit, where.get("git_dirty") and "changed"),
        "command": where.get("command"),
        "target": _noted(name and last_part(name), ", ".join(marks)),
        "dtype": _noted(where.get("dtype"), where.get("quantized") and "quantized"),
        "device": _noted(where.get("device"), cpu),
        "threads": where.get("threads"),
        "load at the start": None if load is None else f"{load:.1f}",
        "prompts": prompts and f"{prompts['num']} of {last_part(prompts['source'])}",
        "sampling": sampling and _sampling(sampling),
        **{key.replace("_", " "): config.get(key) for key in keys},
        **{f"arm {arm['name']}": _arm(arm) for arm in config.get("arms") or ()},
        "versions": ", ".join(f"{k} {v}" for k, v in (where.get("versions") or {}).items()) or None,
    }


def _noted(text: str | None, note: str | None) -> str | None:
    """Add a note in parentheses, where there is one."""
    return f"{text} ({note})" if text and note else text or None


def _sampling(sampling: dict[str, Any]) -> str:
    """Give the temperature, and what is not off."""
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    others = {k: v for k, v in sampling.items() if k != "temperature" and v != off.get(k, 0)}
    said = [f"T = {sampling.get('temperature', 0):g}", *(f"{k} {v}" for k, v in others.items())]
    return ", ".join(said)


def _arm(arm: dict[str, Any]) -> str:
    said = [f"{key} {value}" for key, value in arm.items() if value and key not in ("name", "type")]
    return ", ".join([arm["type"], *said])
