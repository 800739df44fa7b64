"""The results of a bench as a table."""

from typing import Any

from rich.table import Table


def results_table(results: dict[str, Any]) -> Table:
    """One row an arm; intervals are 95 % over prompts."""
    where = results["provenance"]
    config = where["config"]
    title = (
        f"{config['target']['path']} on {where['device']}, {where['dtype']}, batch "
        f"{config['batch_size']}, T = {config['sampling']['temperature']:g}, "
        f"{config['prompts']['source']} prompts"
    )
    table = Table(title=title, caption="95 % intervals over prompts in brackets")
    table.add_column("arm")
    for column in (
        "tau",
        "accepted",
        "tokens/s",
        "vs plain",
        "vs transformers",
        "loop eff.",
        "mismatch",
        "failed",
    ):
        table.add_column(column, justify="right")
    for arm in results["arms"]:
        table.add_row(
            arm["name"],
            _with_interval(arm, "tau", 2),
            "-" if not arm["acceptance_rate"] else f"{arm['acceptance_rate']:.0%}",
            _number(arm["decode_tokens_per_s"], 0),
            _with_interval(arm, "speedup_vs_plain", 2),
            _with_interval(arm, "speedup_vs_hf", 2),
            _number(arm["loop_efficiency"], 3),
            "-" if arm["mismatches"] is None else str(arm["mismatches"]),
            str(arm["failed"]),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_interval(arm: dict[str, Any], key: str, digits: int) -> str:
    value, interval = arm[key], arm[f"{key}_ci"]
    if value is None or interval is None:
        return _number(value, digits)
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
