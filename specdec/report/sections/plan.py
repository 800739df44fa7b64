"""What a plan chose."""

import json
from collections.abc import Sequence
from typing import Any

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.derived import Match, match_all, median_error, rank_correlation
from specdec.report.figures.speed import estimated_speed, predicted_against_measured
from specdec.report.runs import Run
from specdec.report.sections.bench import measured
from specdec.report.tables import timed_or_fitted

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


_COLUMNS = (
    Column("batch_size", "batch", 0),
    Column("name", "draft model"),
    Column("alpha", "alpha, given", 3, term="alpha"),
    Column("num_draft_tokens", "best length, estimated", 0),
    Column("estimated_tau", "tau, estimated", 2, term="tau"),
    Column("estimated_speedup", "speed / plain, estimated", 2, "x", term="estimate"),
    Column("estimated_tokens_per_s", "tokens/s, estimated", 1, term="estimate"),
    Column("estimated_step_ms", "ms a step, estimated", 1),
    Column("estimated_draft_forward_ms", "ms a draft forward, estimated", 2),
)


def estimate(runs: Sequence[Run]) -> Section:
    """The best length of every draft model, what it assumes, and speed by length."""
    section = Section("estimate", "Estimate for other hardware")
    estimates = [run for run in runs if run.kind == "estimate"]
    if not estimates:
        section.missing.append(
            "No estimate among the runs: give the --out folder of specdec plan for hardware that "
            "is not here."
        )
    for place, run in enumerate(estimates, start=1):
        section.text.append(f"{run.label}, {run.data['label']}. It assumes:")
        section.text += run.data["assumptions"]
        drafters = run.data["drafters"]
        rows = [{**drafter, **drafter["best"]} for drafter in drafters]
        caption = f"{run.label}: estimates, not measurements"
        section.tables.append(Table(f"estimate-{place}", caption, _COLUMNS, rows))
        smallest = min(drafter["batch_size"] for drafter in drafters)
        shown = [drafter for drafter in drafters if drafter["batch_size"] == smallest]
        said = "; ".join(
            f"{d['name']} {d['best']['estimated_speedup']:.2f}x at {d['best']['num_draft_tokens']}"
            for d in shown
        )
        section.figures.append(
            Figure(
                f"estimate-{place}",
                f"{run.label}: estimated speed over plain decoding by draft length, batch "
                f"{smallest}; nothing was measured.",
                f"Lines of estimated speed against draft length. Best: {said}.",
                estimated_speed(shown),
            )
        )
    return section


def prediction(runs: Sequence[Run]) -> Section:
    """Every configuration of a plan that a bench measured."""
    section = Section("prediction", "Prediction against measurement")
    plans, benches = [run for run in runs if run.kind == "plan"], measured(runs)
    if not plans or not benches:
        section.missing.append("It needs a plan and a bench of the same machine among the runs.")
        return section
    matches, why = match_all(plans, benches)
    section.missing += why
    if not matches:
        section.missing.append(
            "No configuration of a plan was measured: none has an arm of the same type, options "
            "and batch size."
        )
        return section
    section.text.append(_summary(matches))
    section.figures.append(
        Figure(
            "prediction-1",
            "Each point is one configuration, with 95 % intervals; on the diagonal the plan was "
            "right.",
            f"Scatter plot of predicted against measured speed. {_summary(matches)}",
            predicted_against_measured(matches),
        )
    )
    section.tables.append(_table(matches))
    return section


def _summary(matches: Sequence[Match]) -> str:
    rank = rank_correlation(matches)
    said = "not defined" if rank is None else f"{rank:.3f}"
    return (
        f"{len(matches)} configurations: median error {100 * median_error(matches):.1f} %, rank "
        f"correlation (Spearman) {said}."
    )


def _table(matches: Sequence[Match]) -> Table:
    rows = [
        {
            "name": each.arm["name"],
            "run": each.run,
            "batch": each.configuration["batch_size"],
            "predicted_tau": each.configuration.get("predicted_tau"),
            "predicted_tau_ci": each.configuration.get("predicted_tau_ci"),
            "tau": each.arm["tau"],
            "tau_ci": each.arm["tau_ci"],
            "predicted": each.predicted,
            "predicted_ci": each.configuration.get("predicted_speedup_ci"),
            "measured": each.measured,
            "measured_ci": each.arm["speedup_vs_plain_ci"],
            "error": 100 * each.error,
        }
        for each in matches
    ]
    columns = (
        Column("name", "arm"),
        Column("run", "measured in"),
        Column("batch", "batch", 0),
        Column("predicted_tau", "tau, predicted", 2, term="tau"),
        Column("tau", "tau, measured", 2),
        Column("predicted", "speed, predicted", 2, "x", term="speedup"),
        Column("measured", "speed, measured", 2, "x"),
        Column("error", "error", 1, " %"),
    )
    return Table("predictions", "Predicted and measured", columns, rows)
