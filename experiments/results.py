"""The committed results of the experiments, and how their figures are written."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from specdec.bench.results import BenchArm, SuiteArm, SweepResults
from specdec.report.runs import read_file
from specdec.report.tables import Column

HERE = Path(__file__).parent
Arms = dict[str, Any]  # name -> arm
KINDS = ("bench", "sweep", "suite", "plan", "analysis", "bake-off")
KNOWN = tuple(f"specdec-{kind}" for kind in KINDS)


@cache
def read(name: str) -> Any:
    """Read a results file, by its path below this folder, as its model; other files as they are."""
    content = json.loads((HERE / name).read_text())
    if isinstance(content, dict) and content.get("schema", "").startswith(KNOWN):
        return read_file(HERE / name)[1]
    return content


def arms_of(run: Any) -> Arms:
    """Give the arms of a run, a sweep's cell or a suite's group, by name."""
    return {arm.name: arm for arm in run.arms}


def cells_of(sweep: SweepResults, *keys: str) -> dict[Any, Arms]:
    """Give the arms of a sweep's cells, by the values of these settings: one value, or a tuple."""
    found = {}
    for cell in sweep.cells:
        values = tuple(cell.settings[key] for key in keys)
        found[values if len(keys) > 1 else values[0]] = arms_of(cell)
    return found


def groups_of(suite: str) -> dict[str, Arms]:
    """Give the arms of a suite's groups, by the groups' names; the suite by its path."""
    return {group.name: arms_of(group) for group in read(suite).groups}


def strategies(arms: Arms) -> list[str]:
    """Name the arms that draft."""
    return [name for name in arms if name not in ("plain", "hf_generate")]


def figure(arm: Any, key: str) -> str:
    """Write a figure with its interval; "-" where there is none."""
    return Column(key, key, digits=2).cell(arm)


def brief(arm: BenchArm | SuiteArm) -> str:
    """Write speed and accepted length in little room."""
    return f"{arm.speedup_vs_plain:.2f} ({arm.tau:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
