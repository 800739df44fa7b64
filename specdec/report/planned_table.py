"""What a plan predicted beside what a bench measured, as a table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.report.plan_table import not_trusted, timed_or_fitted
from specdec.report.table import number


def planned_table(plan: dict[str, Any], results: dict[str, Any]) -> Table:
    """One row an arm that the plan knows, the chosen one marked.

    Args:
        plan: the content of `plan.json`.
        results: the content of `results.json`, of the same prompts and settings.
    """
    choice = plan["choice"]["name"]
    table = Table(
        title=f"The plan chose: {choice}",
        caption="\n".join(["speed / plain; in brackets: 95 % intervals", *not_trusted(plan)]),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", overflow="fold")
    headers = ("tau\npredicted", "tau\nmeasured", "steps\nare", "speed\npredicted")
    for header in (*headers, "speed\nmeasured", "measured /\npredicted"):
        table.add_column(header, justify="right", no_wrap=True)
    predictions = {each["name"]: each for each in plan["configurations"]}
    for arm in results["arms"]:
        known = predictions.get(arm["name"])
        measured = arm["speedup_vs_plain"]
        # A draft length that changes with the batch is another configuration than the plan's.
        if known is None or measured is None or arm["draft_length"] is not None:
            continue
        table.add_row(
            arm["name"] + (" *" if arm["name"] == choice else ""),
            number(known["predicted_tau"], 2),
            number(arm["tau"], 2),
            timed_or_fitted(known),
            _speed(known["predicted_speedup"], known["predicted_speedup_ci"]),
            _speed(measured, arm["speedup_vs_plain_ci"]),
            number(measured / known["predicted_speedup"], 2),
        )
    return table


def _speed(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return number(value, 2)
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
