"""Sections of analyses, exact expectations, calibration, hardest contexts, and of trainings."""

from collections.abc import Sequence
from typing import Any

from specdec.analysis.results import Analysis, Counterfactuals
from specdec.common.files import parse_line
from specdec.report import figures
from specdec.report.document import AbsentError, Context, Section
from specdec.report.runs import Run
from specdec.report.tables import Column, Table

_HARDEST = 5
_RANKS = 5
_PLACES = {
    "entropy_bins": "entropy of the target, nats",
    "token_classes": "class of the token that came",
    "positions": "position in the answer",
}


def analysis_table(analysis: Analysis, label: str = "") -> Table:
    temperature = analysis.provenance.config.sampling.temperature
    tokens = sum(prompt.new_tokens for prompt in analysis.prompts)
    rows = [
        {
            **vars(drafter),
            **{f"depth {n}": x for n, x in enumerate(drafter.per_depth_conditional, start=1)},
            "best chain": _best(drafter.expected.chains, "length"),
            "best tree": _best(drafter.expected.trees, "nodes"),
        }
        for drafter in analysis.drafters
    ]
    caption = (
        f"{label}{len(analysis.prompts)} texts of {tokens} new tokens, T = {temperature:g}: "
        "expected, not measured"
    )
    return Table("analysis", caption, rows, legend=analysis.provenance.notes)


def _best(drafts: Sequence[Any], size: str) -> str | None:
    best = max(drafts, key=lambda each: each.tau, default=None)
    return best and f"{best.tau:.2f} ({getattr(best, size)})"


def add_analysis(section: Section, run: Run) -> None:
    drafters = run.data.drafters
    section.show(analysis_table(run.data, f"{run.label}: "))
    _add_depths(section, run)
    _add_expected(section, run)
    guesses = [Column(str(rank), f"guess {rank}", 3) for rank in range(1, _RANKS + 1)]
    rows = [
        {"name": drafter.name, "depth": depth, **{str(n): x for n, x in enumerate(ranks, start=1)}}
        for drafter in drafters
        for depth, ranks in enumerate(drafter.coverage, start=1)
    ]
    caption = f"{run.label}: coverage by depth and rank"
    section.show(Table("coverage", caption, rows, guesses))
    for key, title in _PLACES.items():
        shown = [Column("kind", title), Column("count", "most places", 0)]
        shown += [Column(f"drafter {drafter.name}", drafter.name, 3) for drafter in drafters]
        caption = f"{run.label}: acceptance of the first drafted token by {title}"
        section.show(Table(key.replace("_", "-"), caption, _places(drafters, key), shown))
    section.missing += [
        f"{drafter.name} of {run.label} is not expected as configured: "
        f"{drafter.not_configured_because}"
        for drafter in drafters
        if drafter.not_configured_because
    ]


def _add_depths(section: Section, run: Run) -> None:
    curves = []
    for drafter in run.data.drafters:
        if drafter.configured and drafter.per_depth_conditional:
            steps = sum(drafter.configured.steps)
            whole = [count / steps for count in drafter.configured.accepted_at]
            curves.append((drafter.name, whole, drafter.per_depth_conditional))
    if curves:
        png = figures.acceptance_by_depth(curves)
        section.draw("expected-depths", png, curves, label=run.label)


def _add_expected(section: Section, run: Run) -> None:
    """Show the tau of other drafts than the configured one."""
    drafts = {drafter.name: _drafts(drafter.expected) for drafter in run.data.drafters}
    rows = [
        {"name": name, "draft": draft, **vars(each)}
        for name, found in drafts.items()
        for draft, each in found.items()
    ]
    if not rows:
        section.missing.append(f"No drafter of {run.label} has a tau for other drafts.")
        return
    best = [(name, max(x.tau for x in found.values())) for name, found in drafts.items() if found]
    section.draw("expected", figures.expected_tau(run.data.drafters), best, label=run.label)
    section.show(Table("expected", f"{run.label}: expected tau of other drafts", rows))


def _drafts(expected: Counterfactuals) -> dict[str, Any]:
    return {
        **{f"chain of {each.length}": each for each in expected.chains},
        **{f"tree of {each.nodes}": each for each in expected.trees},
        **{f"chain while above {each.threshold:g}": each for each in expected.thresholds},
    }


def _places(drafters: Sequence[Any], key: str) -> list[dict[str, Any]]:
    """Give acceptance of the first drafted token, a row a kind of place."""
    rows: dict[str, dict[str, Any]] = {}
    for drafter in drafters:
        for each in getattr(drafter, key):
            kind = getattr(each, "name", None)
            if kind is None:
                to = "" if each.high is None else f" to below {each.high:g}"
                kind = f"from {each.low:g}{to}"
            row = rows.setdefault(kind, {"kind": kind, "count": 0})
            row["count"] = max(row["count"], each.count)
            row[f"drafter {drafter.name}"] = each.acceptance
    return list(rows.values())


def add_calibration(section: Section, run: Run) -> None:
    shown = [each for each in run.data.drafters if each.calibration and each.calibration.bins]
    if not shown:
        raise AbsentError(f"No drafter of {run.label} tells how sure it is.")
    section.draw("calibration", figures.reliability(shown), shown, label=run.label)


def add_hardest(section: Section, run: Run) -> None:
    """Quote the places where drafter and target agree least."""
    section.contexts += [
        Context(
            drafter=drafter.name,
            where=f"prompt {place.prompt}, token {place.position} of the answer",
            before=f"… {place.before}",
            rejected=_visible("".join(place.drafted)),
            target=_visible(place.target),
            note=f"The token that came: p {place.p:.3g} (target), q {place.q:.3g} (drafter); "
            f"overlap of the distributions {place.overlap:.3g}.",
        )
        for drafter in run.data.drafters
        for place in drafter.hardest[:_HARDEST]
    ]


def _visible(token: str) -> str:
    """Show the blanks of a token that has nothing else."""
    return token if token.strip() else token.replace(" ", "␣").replace("\n", "↵") or "(no text)"


def add_training(section: Section, runs: Sequence[Run]) -> None:
    """Show a row a training, with its parity gate, and its curves."""
    trained = [run for run in runs if run.kind == "train"]
    rows = [{"run": run.label, **vars(run.data)} for run in trained]
    if rows:
        section.show(Table("training", "Drafters, and acceptance on held-out rows", rows))
    for run in trained:
        log = run.folder / "log.jsonl"
        lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
        if records := [row for row in map(parse_line, lines) if row]:
            section.draw("training", figures.curves(records), [run.data], label=run.label)
        else:
            section.missing.append(f"The log of {run.label} is gone, and with it its curves.")
