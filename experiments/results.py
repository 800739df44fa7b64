"""The committed results of the experiments, and how their figures are written."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from specdec.report.runs import renew

HERE = Path(__file__).parent
Arms = dict[str, dict[str, Any]]


@cache
def read(name: str) -> dict[str, Any]:
    """A results file, by its path below this folder; speeds of older ones are those of today."""
    content: dict[str, Any] = json.loads((HERE / name).read_text())
    if isinstance(content, dict):
        renew(content, dealt(content) if name.startswith("05") else ())  # others show no domains
    return content


def dealt(content: dict[str, Any]) -> list[str]:
    """Domains of a sweep's prompts, which an older one does not hold: they are dealt in turn."""
    arms = [arm for cell in content.get("cells", ()) for arm in cell["arms"]]
    names = list(arms[0]["domains"]) if arms else []
    return [names[place % len(names)] for place in range(arms[0]["prompts"])] if arms else []


def arms_of(run: dict[str, Any]) -> Arms:
    """The arms of a run or of a sweep's cell, by name."""
    return {arm["name"]: arm for arm in run["arms"]}


def cells_of(sweep: dict[str, Any], *keys: str) -> dict[Any, Arms]:
    """The arms of a sweep's cells, by the values of these settings: one value, or a tuple."""
    found = {}
    for cell in sweep["cells"]:
        values = tuple(cell["settings"][key] for key in keys)
        found[values if len(keys) > 1 else values[0]] = arms_of(cell)
    return found


def groups_of(suite: str) -> dict[str, Arms]:
    """The arms of a suite's groups, by the groups' names; the suite by its path."""
    return {group["name"]: arms_of(group) for group in read(suite)["groups"]}


def speed(arm: dict[str, Any]) -> float:
    """Total decode time of plain decoding over the arm's, for the same prompts."""
    ratio: float = arm["speedup_vs_plain"]
    return ratio


def figure(arm: dict[str, Any], key: str) -> str:
    """A figure with its interval; "-" where there is none."""
    if arm[key] is None:
        return "-"
    interval = arm.get(f"{key}_ci")
    if interval is None or interval[0] == interval[1] == arm[key]:
        return f"{arm[key]:.2f}"
    return f"{arm[key]:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def brief(arm: dict[str, Any]) -> str:
    """Speed and accepted length in little room."""
    return f"{speed(arm):.2f} ({arm['tau']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
