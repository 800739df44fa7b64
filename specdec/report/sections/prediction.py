"""Prediction against measurement."""

from collections.abc import Sequence

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.figures.prediction import predicted_against_measured
from specdec.report.prediction import Match, match_all, median_error, rank_correlation
from specdec.report.runs import Run
from specdec.report.sections.bench import measured


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
