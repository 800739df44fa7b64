"""A plan, or an estimate, as tables."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def plan_table(plan: dict[str, Any]) -> Table:
    """The choice and the runners-up.

    Args:
        plan: the content of `plan.json`.
    """
    size, tokens = plan["choice"]["batch_size"], plan["workload"]["tokens"]
    table = _table(
        f"plan for batch size {size}: predictions from measured costs and the acceptance of "
        f"{tokens} tokens",
        "in brackets: 95 % intervals; tau: from acceptance; step: milliseconds of draft, target "
        "and everything else, timed as it is or fitted to other shapes"
        + "".join(f"\n{x}" for x in not_trusted(plan)),
    )
    for header in ("", "configuration"):
        table.add_column(header, overflow="fold")
    for header in ("tau", "vs plain", "step is", "step", "draft", "target", "other"):
        table.add_column(header, justify="right", no_wrap=True)
    for place, row in enumerate([plan["choice"], *plan["runners_up"]]):
        step = row["step_ms"]
        table.add_row(
            "choice" if place == 0 else str(place + 1),
            row["name"],
            _with_interval(row, "predicted_tau"),
            _with_interval(row, "predicted_speedup"),
            timed_or_fitted(row),
            *(f"{step[part]:.2f}" for part in ("wall", "draft", "target", "other")),
        )
    return table


def timed_or_fitted(configuration: dict[str, Any]) -> str:
    """Where the times of its steps come from."""
    return "timed" if configuration["is_timed"] else "fitted"


def not_trusted(plan: dict[str, Any]) -> list[str]:
    """A warning about a plan whose times a busy machine made; none for others, or old ones."""
    trust = plan.get("trust")
    if not trust or trust["is_trusted"]:
        return []
    return [
        f"its times are not to be trusted: {'; '.join(trust['reasons'])}; plan again, in a new "
        "folder, with nothing else running"
    ]


def schedule_table(plan: dict[str, Any]) -> Table:
    """The draft length of every batch size."""
    table = _table(
        f"nodes to draft, {plan['controller']['drafter']}",
        "0: plain decoding",
    )
    table.add_column("rows", justify="right")
    table.add_column("nodes", justify="right")
    table.add_column("vs plain", justify="right")
    table.add_column("step is")
    for size, nodes in plan["schedule"].items():
        here = [row for row in plan["schedule_predictions"] if row["batch_size"] == int(size)]
        best = next((row for row in here if row["nodes"] == nodes), None)
        gain = f"{best['predicted_speedup']:.2f}" if best else "1.00"
        table.add_row(size, str(nodes), gain, timed_or_fitted(best) if best else "timed")
    return table


def costs_table(plan: dict[str, Any]) -> Table:
    """What the fits leave over."""
    table = _table("fits of measured times", "errors are relative to the measured time")
    table.add_column("what")
    for header in ("rows", "points", "median error", "largest"):
        table.add_column(header, justify="right")
    costs = plan["costs"]
    for size, fit in costs["forward"].items():
        count = sum(p["batch_size"] == int(size) and not p["is_tree"] for p in costs["points"])
        _residuals(table, "target forward", size, count, fit["chain"]["residuals"])
    for row in costs["drafters"]:
        name, size = f"step with {row['drafter']}", str(row["batch_size"])
        _residuals(table, name, size, len(row["points"]), row["residuals"])
    return table


def _residuals(table: Table, name: str, size: str, count: int, errors: dict[str, float]) -> None:
    table.add_row(name, size, str(count), f"{errors['median']:.1%}", f"{errors['largest']:.1%}")


def estimate_table(estimate: dict[str, Any]) -> Table:
    """An estimate's drafters at their best draft lengths.

    Args:
        estimate: what `specdec.planning.roofline.estimate` gave.
    """
    table = _table("ESTIMATE from stated parameters: nothing here was measured", None)
    table.add_column("drafter")
    for header in ("rows", "alpha", "est. draft ms", "est. best length", "est. tau"):
        table.add_column(header, justify="right")
    for header in ("est. step ms", "est. vs plain", "est. tokens/s a row"):
        table.add_column(header, justify="right")
    for row in estimate["drafters"]:
        best = row["best"]
        table.add_row(
            row["name"],
            str(row["batch_size"]),
            str(row["alpha"]),
            f"{row['estimated_draft_forward_ms']:.2f}",
            str(best["num_draft_tokens"]),
            f"{best['estimated_tau']:.2f}",
            f"{best['estimated_step_ms']:.2f}",
            f"{best['estimated_speedup']:.2f}",
            f"{best['estimated_tokens_per_s']:.1f}",
        )
    return table


def _table(title: str, caption: str | None) -> Table:
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _with_interval(row: dict[str, Any], key: str) -> str:
    interval = row[f"{key}_ci"]
    shown = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{row[key]:.2f}{shown}"
