"""Suites: single-turn, multi-turn, long contexts, concurrent users."""

from collections.abc import Sequence
from typing import Any

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.figures.suite import Interval, speed_by_group
from specdec.report.runs import Run

_COLUMNS = (
    Column("group", "group"),
    Column("name", "arm"),
    Column("requests", "requests", 0),
    Column("tau", "tau", 2, term="tau"),
    Column("decode_tokens_per_s", "tokens/s", 0, term="speed"),
    Column("speedup_vs_plain", "speed / plain", 2, "x", term="speedup"),
    *(
        Column(f"{kind} {part}", f"{title} {part}, ms", 1)
        for kind, title in (("ttft_s", "TTFT"), ("itl_s", "ITL"))
        for part in ("p50", "p95", "p99")
    ),
    Column("failed", "failed", 0),
)
_LOAD = (
    Column("group", "group"),
    Column("name", "arm"),
    Column("users", "users", 0),
    Column("tokens_per_s", "tokens/s of all", 0),
    Column("tokens_per_s_vs_plain", "of all / plain", 2, "x"),
    Column("user_tokens_per_s_mean", "tokens/s of a user", 1),
    Column("user_speed_vs_plain", "of a user / plain", 2, "x"),
    Column("jain_index", "Jain's fairness", 3),
    Column("worst_over_mean", "slowest / mean", 2),
    Column("queue p95", "queue p95, ms", 1),
    Column("cache_mb", "cache, MB", 1),
    Column("power_w", "power, W", 0),
)


def suite(runs: Sequence[Run]) -> Section:
    """Latency by group, and the load where there were users."""
    section = Section("suite", "Suites")
    suites = [run for run in runs if run.kind == "suite"]
    if not suites:
        section.missing.append(
            "No suite among the runs: give the --out folder of specdec bench for a suite."
        )
    for place, run in enumerate(suites, start=1):
        rows = [_row(group, arm) for group in run.data["groups"] for arm in group["arms"]]
        _add_figure(section, run, place)
        caption = f"{run.label}: {run.data['suite'].replace('_', ' ')}"
        section.tables.append(Table(f"suite-{place}", caption, _COLUMNS, rows))
        loaded = [row for row in rows if row.get("users")]
        if loaded:
            caption = f"{run.label}: users at the same time"
            section.tables.append(Table(f"load-{place}", caption, _LOAD, loaded))
    return section


def _row(group: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    cache = arm["memory"]["cache_bytes"]
    return {
        **arm,
        **(arm["load"] or {}),
        "group": group["name"],
        **_milliseconds("ttft_s", arm["ttft_s"]),
        **_milliseconds("itl_s", arm["itl_s"]),
        **_milliseconds("queue", arm["queue_s"]),
        "cache_mb": cache and cache / 1e6,
        "power_w": arm["power"]["power_w"],
    }


def _milliseconds(key: str, seconds: dict[str, float]) -> dict[str, float]:
    return {f"{key} {part}": 1000 * value for part, value in seconds.items()}


def _add_figure(section: Section, run: Run, place: int) -> None:
    """Speed of every arm by group, where there is more than one."""
    groups = run.data["groups"]
    names = [group["name"] for group in groups]
    lines: dict[str, list[float | None]] = {}
    intervals: dict[str, list[Interval]] = {}
    for group in groups:
        for arm in group["arms"]:
            if arm["name"] != "plain":
                lines.setdefault(arm["name"], []).append(arm["speedup_vs_plain"])
                intervals.setdefault(arm["name"], []).append(arm.get("speedup_vs_plain_ci"))
    if len(names) < 2 or not any(value for values in lines.values() for value in values):
        return
    said = "; ".join(
        f"{name} from {_first(values):.2f}x to {_first(values[::-1]):.2f}x"
        for name, values in lines.items()
        if any(values)
    )
    section.figures.append(
        Figure(
            f"suite-{place}",
            f"{run.label}: speed over plain decoding by group, with 95 % intervals over requests.",
            f"Lines of speed over plain decoding by group, from {names[0]} to {names[-1]}. {said}.",
            speed_by_group(names, lines, intervals),
        )
    )


def _first(values: Sequence[float | None]) -> float:
    return next(value for value in values if value is not None)
