"""What a plan chose."""

import json
from collections.abc import Sequence
from typing import Any

from specdec.report.blocks import Column, Section, Table
from specdec.report.plan_table import timed_or_fitted
from specdec.report.runs import Run

_CONFIGURATION = (
    Column("name", "configuration"),
    Column("type", "type"),
    Column("options", "options"),
    Column("batch_size", "batch", 0),
    Column("predicted_tau", "tau, predicted", 2, term="tau"),
    Column("predicted_speedup", "speed / plain, predicted", 2, "x", term="speedup"),
    Column("step_is", "its steps are"),
    Column("target", "target, ms a step", 2),
    Column("draft", "draft, ms a step", 2),
    Column("other", "rest, ms a step", 2),
)


def plan(runs: Sequence[Run]) -> Section:
    """Choice, runners-up and schedule of every plan."""
    section = Section("plan", "Plan")
    plans = [run for run in runs if run.kind == "plan"]
    if not plans:
        section.missing.append("No plan among the runs: give the --out folder of specdec plan.")
    for place, run in enumerate(plans, start=1):
        chosen = [row for row in (run.data["choice"], *run.data["runners_up"]) if row]
        rows = [_row(configuration) for configuration in chosen]
        caption = f"{run.label}: the choice, and the runners-up"
        section.tables.append(Table(f"choice-{place}", caption, _CONFIGURATION, rows))
        section.tables.append(_schedule(run, place))
    return section


def _row(configuration: dict[str, Any]) -> dict[str, Any]:
    options = json.dumps(configuration["options"]) if configuration["options"] else None
    step = {"step_is": timed_or_fitted(configuration), **(configuration.get("step_ms") or {})}
    return {**configuration, "options": options, **step}


def _schedule(run: Run, place: int) -> Table:
    rows = [
        {"batch": f"from {size}", "nodes": "0, plain decoding" if not nodes else str(nodes)}
        for size, nodes in sorted(run.data["schedule"].items(), key=lambda item: int(item[0]))
    ]
    columns = (Column("batch", "batch size"), Column("nodes", "nodes a row may draft"))
    return Table(f"schedule-{place}", f"{run.label}: draft length by batch size", columns, rows)
