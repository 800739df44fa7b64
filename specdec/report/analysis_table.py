"""An analysis as a table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def analysis_table(analysis: dict[str, Any]) -> Table:
    """One row a drafter.

    Args:
        analysis: the content of `analysis.json`.
    """
    table = Table(
        title=_title(analysis),
        caption="tau: expected accepted length as configured; best: of chains up to 10 tokens, and "
        "of static trees\nin brackets: 95 % intervals over prompts",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("drafter", overflow="fold")
    for header in ("alpha", "tau", "depth 1", "2", "3", "ECE", "best\nchain", "best\ntree"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in analysis["drafters"]:
        configured = each["configured"] or {"tau": None, "tau_ci": None}
        depths = [*each["per_depth_conditional"], None, None, None][:3]
        table.add_row(
            each["name"],
            _with_interval(each["alpha"], each["alpha_ci"]),
            _with_interval(configured["tau"], configured["tau_ci"]),
            *map(_number, depths),
            _number((each["calibration"] or {}).get("ece")),
            _best(each["expected"]["chains"], "length"),
            _best(each["expected"]["trees"], "nodes"),
        )
    return table


def _title(analysis: dict[str, Any]) -> str:
    config, texts = analysis["provenance"]["config"], len(analysis["prompts"])
    tokens = sum(prompt["new_tokens"] for prompt in analysis["prompts"])
    return (
        f"{texts} texts of {tokens} new tokens, T = {config['sampling']['temperature']:g}: "
        "expected, not measured"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return _number(value)
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _best(rows: list[dict[str, Any]], size: str) -> str:
    if not rows:
        return "-"
    best = max(rows, key=lambda row: row["tau"])
    return f"{best['tau']:.2f} ({best[size]})"
