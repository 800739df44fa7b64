"""Sections of analyses: exact expectations, calibration, hardest contexts."""

from collections.abc import Sequence
from typing import Any

from specdec.analysis.results import Analysis, Counterfactuals, DrafterAnalysis, HardContext
from specdec.report.document import Context, Section
from specdec.report.figures.analysis import expected_tau, reliability
from specdec.report.figures.bench import acceptance_by_depth
from specdec.report.runs import Run
from specdec.report.tables import Column, Table

_NAME = Column("name", "drafter")
_HARDEST = 5
_RANKS = 5


def analysis_table(analysis: Analysis, label: str = "") -> Table:
    """Show one row a drafter."""
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
    return Table(
        id="analysis",
        caption=f"{label}{len(analysis.prompts)} texts of {tokens} new tokens, "
        f"T = {temperature:g}: expected, not measured",
        columns=[
            _NAME,
            Column("alpha", "alpha", 3, term="alpha", rank=1),
            Column("configured.tau", "tau", 2, term="tau", rank=2),
            Column("configured.nodes_per_step", "nodes a step", 1, is_wide=True),
            Column("depth 1", "depth 1", 2, term="conditional"),
            Column("depth 2", "2", 2),
            Column("depth 3", "3", 2),
            Column("calibration.ece", "ECE", 3, term="ece"),
            Column("best chain", "best\nchain"),
            Column("best tree", "best\ntree"),
            Column("method", "from", is_wide=True),
        ],
        rows=rows,
        legend=[
            "tau: expected accepted length as configured; best: of chains up to 10 tokens, and of "
            "static trees"
        ],
    )


def _best(drafts: Sequence[Any], size: str) -> str | None:
    best = max(drafts, key=lambda each: each.tau, default=None)
    return best and f"{best.tau:.2f} ({getattr(best, size)})"


def add_analysis(section: Section, run: Run) -> None:
    """Show alpha, expected tau, coverage, and acceptance by entropy, class and position."""
    drafters = run.data.drafters
    section.show(analysis_table(run.data, f"{run.label}: "))
    _add_depths(section, run.label, drafters)
    _add_expected(section, run.label, drafters)
    coverage = [
        {"name": drafter.name, "depth": depth, **{str(n): x for n, x in enumerate(ranks, start=1)}}
        for drafter in drafters
        for depth, ranks in enumerate(drafter.coverage, start=1)
    ]
    ranks = [Column(str(rank), f"guess {rank}", 3) for rank in range(1, _RANKS + 1)]
    columns = [_NAME, Column("depth", "depth", 0, term="coverage"), *ranks]
    section.tabulate("coverage", f"{run.label}: coverage by depth and rank", columns, coverage)
    for key, title in (
        ("entropy_bins", "entropy of the target, nats"),
        ("token_classes", "class of the token that came"),
        ("positions", "position in the answer"),
    ):
        _add_places(section, run.label, drafters, key, title)
    section.missing += [
        f"{drafter.name} of {run.label} is not expected as configured: "
        f"{drafter.not_configured_because}"
        for drafter in drafters
        if drafter.not_configured_because
    ]


def _add_depths(section: Section, label: str, drafters: Sequence[DrafterAnalysis]) -> None:
    """Draw expected acceptance by depth, as configured."""
    curves = []
    for drafter in drafters:
        if drafter.configured and drafter.per_depth_conditional:
            steps = sum(drafter.configured.steps)
            whole = [count / steps for count in drafter.configured.accepted_at]
            curves.append((drafter.name, whole, drafter.per_depth_conditional))
    if curves:
        said = "; ".join(f"{name} from {whole[0]:.2f} at depth 1" for name, whole, _ in curves)
        section.draw(
            "expected-depths",
            f"{label}: expected acceptance by depth, as configured; above of all steps, below of "
            "the steps that tested the depth.",
            f"Two line plots of expected acceptance by depth. {said}.",
            acceptance_by_depth(curves),
        )


def _add_expected(section: Section, label: str, drafters: Sequence[DrafterAnalysis]) -> None:
    """Show the tau of other drafts than the configured one."""
    rows = [
        {"name": drafter.name, "draft": draft, **vars(figures)}
        for drafter in drafters
        for draft, figures in _drafts(drafter.expected)
    ]
    if not rows:
        section.missing.append(f"No drafter of {label} has a tau for other drafts.")
        return
    best = {row["name"]: max(r["tau"] for r in rows if r["name"] == row["name"]) for row in rows}
    said = "; ".join(f"{name} up to {tau:.2f}" for name, tau in best.items())
    section.draw(
        "expected",
        f"{label}: expected tau of chains (filled) and of the best static trees (hollow) by the "
        "number of drafted tokens.",
        f"Expected tau against drafted tokens. {said}.",
        expected_tau(drafters),
    )
    columns = [
        *(_NAME, Column("draft", "draft"), Column("nodes_per_step", "nodes a step", 1)),
        Column("tau", "tau, expected", 2, term="tau"),
    ]
    section.tabulate("expected", f"{label}: expected tau of other drafts", columns, rows)


def _drafts(expected: Counterfactuals) -> list[tuple[str, Any]]:
    """Name each draft."""
    chains = [(f"chain of {each.length}", each) for each in expected.chains]
    trees = [(f"tree of {each.nodes}", each) for each in expected.trees]
    ended = [(f"chain while above {each.threshold:g}", each) for each in expected.thresholds]
    return [*chains, *trees, *ended]


def _add_places(
    section: Section, label: str, drafters: Sequence[DrafterAnalysis], key: str, title: str
) -> None:
    """Show acceptance of the first drafted token: a row a kind of place, a column a drafter."""
    rows: dict[str, dict[str, Any]] = {}
    for drafter in drafters:
        for each in getattr(drafter, key):
            kind = getattr(each, "name", None) or _range(each)
            row = rows.setdefault(kind, {"kind": kind, "count": 0})
            row["count"] = max(row["count"], each.count)
            row[f"drafter {drafter.name}"] = each.acceptance
    names = [Column(f"drafter {drafter.name}", drafter.name, 3) for drafter in drafters]
    columns = [Column("kind", title), Column("count", "most places", 0), *names]
    caption = f"{label}: acceptance of the first drafted token by {title}"
    section.tabulate(key.replace("_", "-"), caption, columns, list(rows.values()))


def _range(each: Any) -> str:
    return f"from {each.low:g}" + ("" if each.high is None else f" to below {each.high:g}")


def add_calibration(section: Section, run: Run) -> None:
    """Draw reliability diagrams."""
    shown = [each for each in run.data.drafters if each.calibration and each.calibration.bins]
    if not shown:
        section.missing.append(f"No drafter of {run.label} tells how sure it is.")
        return
    said = "; ".join(f"{each.name} {each.calibration.ece:.3f}" for each in shown)
    section.draw(
        "calibration",
        f"{run.label}: acceptance of drafted tokens by the drafter's confidence. A point is as "
        "large as its share of the tokens; below the diagonal the drafter is too sure.",
        f"Reliability diagrams, a panel a drafter. Expected calibration errors: {said}.",
        reliability(shown),
    )


def add_hardest(section: Section, run: Run) -> None:
    """Quote the places where drafter and target agree least."""
    section.contexts += [
        _context(drafter.name, place)
        for drafter in run.data.drafters
        for place in drafter.hardest[:_HARDEST]
    ]


def _context(drafter: str, place: HardContext) -> Context:
    return Context(
        drafter=drafter,
        where=f"prompt {place.prompt}, token {place.position} of the answer",
        before=f"… {place.before}",
        rejected=_visible("".join(place.drafted)),
        target=_visible(place.target),
        note=f"The token that came: p {place.p:.3g} (target), q {place.q:.3g} (drafter); "
        f"overlap of the distributions {place.overlap:.3g}.",
    )


def _visible(token: str) -> str:
    """Show the blanks of a token that has nothing else."""
    return token if token.strip() else token.replace(" ", "␣").replace("\n", "↵") or "(no text)"
