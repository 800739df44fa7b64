"""Figures computed for hardware that is not here, labelled as such in every caption."""

from collections.abc import Sequence

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.figures.estimate import estimated_speed
from specdec.report.runs import Run

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
