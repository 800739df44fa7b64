"""Section of suites: speed, waiting and load, a row an arm of a group."""

from pathlib import Path
from typing import Any

from specdec.bench.results import SuiteResults
from specdec.common.files import replace_file
from specdec.report.document import Section
from specdec.report.figures.bench import group_panels
from specdec.report.figures.style import to_png
from specdec.report.runs import Run, title_of
from specdec.report.sections.bench import (
    ACCEPTED,
    ARM,
    CHECKS,
    EFFICIENCY,
    SPEED,
    TAU,
    VS_PLAIN,
    WITH_PREFILL,
    row_of,
)
from specdec.report.tables import Column, Table

# Suite -> what a group is, and keys of the panels of its picture.
_SUITES = {
    "single_turn": ("prompt, tokens", ("speedup_vs_plain", "tau", "ttft_s.p50", "itl_s.p50")),
    "multi_turn": ("turn", ("speedup_vs_plain", "tau", "ttft_s.p50", "latency_s.p50")),
    "long_context": (
        "position, tokens",
        ("speedup_vs_plain", "tau", "decode_tokens_per_s", "ttft_s.p50"),
    ),
    "concurrent": (
        "users",
        (
            *("load.tokens_per_s", "load.user_speed_vs_plain", "ttft_s.p95", "itl_s.p95"),
            *("load.jain_index", "memory.cache_bytes"),
        ),
    ),
}
_ALONE = [TAU, ACCEPTED, SPEED, VS_PLAIN, WITH_PREFILL, EFFICIENCY]
_LOAD = [
    Column("tau", "tau", 2, term="tau"),
    Column("load.tokens_per_s", "tokens/s\nall users", 0),
    Column("load.tokens_per_s_vs_plain", "vs\nplain", 2),
    Column("load.user_tokens_per_s_mean", "tokens/s\na user", 0),
    Column("load.user_speed_vs_plain", "a user's\nvs plain", 2, rank=1),
    Column("load.jain_index", "Jain", 3),
    Column("load.worst_over_mean", "worst\n/mean", 2),
]
_MACHINE = [
    Column("memory.cache_bytes", "cache\nMiB", 0, scale=2**-20, is_optional=True),
    Column("memory.peak_rss_bytes", "process\nMiB", 0, scale=2**-20, is_optional=True),
    Column("memory.peak_device_bytes", "device\nMiB", 0, scale=2**-20, is_optional=True),
    Column("power.energy_j_per_token", "J/token", 3, is_optional=True),
    Column("power.power_w", "power, W", 0, is_optional=True, is_wide=True),
    Column("requests", "requests", 0, is_wide=True),
]


def suite_tables(results: SuiteResults, label: str = "") -> list[Table]:
    """Show speeds, then waiting times."""
    notes = ["differ: requests whose greedy tokens are not plain decoding's"]
    if results.suite == "concurrent":
        notes.append("Jain: 1 where all users are served alike")
    if all(arm.power.energy_j is None for group in results.groups for arm in group.arms):
        notes.append("power: not measured, which takes a CUDA device and nvidia-ml-py")
    meanings = [
        "TTFT: from sending to the first token; ITL: a request's mean time between tokens; "
        "chunk gap: from one chunk of tokens to the next"
    ]
    title = label + title_of(results)
    tables = (
        ("suite", title, _speeds(results), notes),
        ("waiting", f"{title}; waiting times", _waits(results), meanings),
    )
    return [
        Table(
            id=name,
            caption=caption,
            columns=[Column("group", _SUITES[results.suite][0]), ARM, *columns],
            rows=[
                {"group": group.name, **row_of(arm)}
                for group in results.groups
                for arm in group.arms
            ],
            legend=legend,
            num_grouped=1,
        )
        for name, caption, columns, legend in tables
    ]


def _speeds(results: SuiteResults) -> list[Column]:
    return [*(_LOAD if results.suite == "concurrent" else _ALONE), *_MACHINE, *CHECKS]


def _waits(results: SuiteResults) -> list[Column]:
    waits = {"ttft_s": "TTFT", "itl_s": "ITL", "chunk_gap_s": "chunk gap"}
    is_loaded = results.suite == "concurrent"
    waits = {"queue_s": "queue", **waits} if is_loaded else {**waits, "latency_s": "request"}
    return [
        Column(f"{key}.{part}", f"{name}\n{part} ms", 1, scale=1000)
        for key, name in waits.items()
        for part in ("p50", "p95", "p99")
    ]


def draw_suite(results: SuiteResults) -> Any:
    """Draw the figures of a suite that matter most, a panel each."""
    group, keys = _SUITES[results.suite]
    columns = {column.key: column for column in (*_speeds(results), *_waits(results))}
    return group_panels(results, [columns[key] for key in keys], group, title_of(results))


def plot_suite(results: SuiteResults, path: Path) -> None:
    """Write the picture of a suite as a PNG."""
    replace_file(path, to_png(draw_suite(results)))


def add_suite(section: Section, run: Run) -> None:
    """Show a suite's tables and, where it has several groups, its picture."""
    section.show(*suite_tables(run.data, f"{run.label}: "))
    groups = run.data.groups
    if len(groups) > 1:
        section.draw(
            "suite",
            f"{run.label}: every arm by group. Bars are 95 % intervals over requests.",
            f"Lines of speeds and waiting times by group, from {groups[0].name} to "
            f"{groups[-1].name}; the tables hold their values.",
            to_png(draw_suite(run.data)),
        )
