"""What a teacher-forced analysis says: exact expectations, calibration, hard places."""

from collections.abc import Sequence
from typing import Any

from specdec.report.blocks import Column, Context, Figure, Section, Table
from specdec.report.figures.acceptance import acceptance_by_depth, expected_tau, reliability
from specdec.report.runs import Run

NO_ANALYSIS = "No analysis among the runs: give the --out folder of specdec analyze."
_HARDEST = 5
_RANKS = 5


def _analyses(runs: Sequence[Run], section: Section) -> list[Run]:
    found = [run for run in runs if run.kind == "analysis"]
    if not found:
        section.missing.append(NO_ANALYSIS)
    return found


def evidence(runs: Sequence[Run]) -> Section:
    """Alpha, expected tau, coverage, and acceptance by entropy, class and position."""
    section = Section("analysis", "Analysis without sampling noise")
    for place, run in enumerate(_analyses(runs, section), start=1):
        drafters = run.data["drafters"]
        section.tables.append(_overview(run, drafters, place))
        _add_depths(section, run, drafters, place)
        _add_expected(section, run, drafters, place)
        section.tables += [
            _coverage(run, drafters, place),
            _by_place(run, drafters, place, "entropy_bins", "entropy of the target, nats"),
            _by_place(run, drafters, place, "token_classes", "class of the token that came"),
            _by_place(run, drafters, place, "positions", "position in the answer"),
        ]
        section.missing += [
            f"{d['name']} of {run.label} is not expected as configured: "
            f"{d['not_configured_because']}"
            for d in drafters
            if d.get("not_configured_because")
        ]
    return section


def _overview(run: Run, drafters: Sequence[dict[str, Any]], place: int) -> Table:
    rows = [
        {
            **drafter,
            "tau": (drafter["configured"] or {}).get("tau"),
            "tau_ci": (drafter["configured"] or {}).get("tau_ci"),
            "nodes": (drafter["configured"] or {}).get("nodes_per_step"),
            "ece": (drafter["calibration"] or {}).get("ece"),
        }
        for drafter in drafters
    ]
    columns = (
        Column("name", "drafter"),
        Column("alpha", "alpha", 3, term="alpha"),
        Column("tau", "tau, expected", 2, term="tau"),
        Column("nodes", "nodes a step", 1),
        Column("ece", "ECE", 3, term="ece"),
        Column("method", "from"),
    )
    caption = f"{run.label}: each drafter, tau as it is configured"
    return Table(f"analysis-{place}", caption, columns, rows)


def _add_depths(section: Section, run: Run, drafters: Sequence[dict[str, Any]], place: int) -> None:
    """Expected acceptance by depth, as configured."""
    curves = []
    for drafter in drafters:
        configured = drafter["configured"]
        if configured and drafter["per_depth_conditional"]:
            steps = sum(configured["steps"])
            whole = [count / steps for count in configured["accepted_at"]]
            curves.append((drafter["name"], whole, drafter["per_depth_conditional"]))
    if curves:
        said = "; ".join(f"{name} from {whole[0]:.2f} at depth 1" for name, whole, _ in curves)
        section.figures.append(
            Figure(
                f"expected-depths-{place}",
                f"{run.label}: expected acceptance by depth, as configured; above of all steps, "
                "below of the steps that tested the depth.",
                f"Two line plots of expected acceptance by depth. {said}.",
                acceptance_by_depth(curves),
            )
        )


def _add_expected(
    section: Section, run: Run, drafters: Sequence[dict[str, Any]], place: int
) -> None:
    """Tau of other drafts than the configured one, without another run."""
    rows = [
        {"name": drafter["name"], "draft": draft, **each, "tau": each["tau"]}
        for drafter in drafters
        for draft, each in _drafts(drafter["expected"])
    ]
    if not rows:
        section.missing.append(f"No drafter of {run.label} has a tau for other drafts.")
        return
    shown = [d for d in drafters if d["expected"]["chains"] or d["expected"]["trees"]]
    best = {row["name"]: max(r["tau"] for r in rows if r["name"] == row["name"]) for row in rows}
    said = "; ".join(f"{name} up to {tau:.2f}" for name, tau in best.items())
    section.figures.append(
        Figure(
            f"expected-{place}",
            f"{run.label}: expected tau of chains (filled) and of the best static trees (hollow) "
            "by the number of drafted tokens.",
            f"Expected tau against drafted tokens. {said}.",
            expected_tau(shown),
        )
    )
    columns = (
        Column("name", "drafter"),
        Column("draft", "draft"),
        Column("nodes_per_step", "nodes a step", 1),
        Column("tau", "tau, expected", 2, term="tau"),
    )
    caption = f"{run.label}: expected tau of other drafts"
    section.tables.append(Table(f"expected-{place}", caption, columns, rows))


def _drafts(expected: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each draft with its name."""
    chains = [(f"chain of {each['length']}", each) for each in expected["chains"]]
    trees = [(f"tree of {each['nodes']}", each) for each in expected["trees"]]
    ends = [(f"chain while above {e['threshold']:g}", e) for e in expected["thresholds"]]
    return [*chains, *trees, *ends]


def _coverage(run: Run, drafters: Sequence[dict[str, Any]], place: int) -> Table:
    rows = [
        {"name": drafter["name"], "depth": depth, **dict(zip("12345", ranks, strict=False))}
        for drafter in drafters
        for depth, ranks in enumerate(drafter["coverage"], start=1)
    ]
    ranks = [Column(str(rank), f"guess {rank}", 3) for rank in range(1, _RANKS + 1)]
    columns = (Column("name", "drafter"), Column("depth", "depth", 0, term="coverage"), *ranks)
    return Table(f"coverage-{place}", f"{run.label}: coverage by depth and rank", columns, rows)


def _by_place(
    run: Run, drafters: Sequence[dict[str, Any]], place: int, key: str, title: str
) -> Table:
    """Acceptance of the first drafted token by kind of place: a row a kind, a column a drafter."""
    rows: dict[str, dict[str, Any]] = {}
    for index, drafter in enumerate(drafters):
        for each in drafter[key]:
            name = each.get("name") or _range(each)
            row = rows.setdefault(name, {"kind": name, "count": each["count"]})
            row["count"] = max(row["count"], each["count"])
            row[f"drafter {index}"] = each["acceptance"]
    names = [Column(f"drafter {i}", drafter["name"], 3) for i, drafter in enumerate(drafters)]
    columns = (Column("kind", title), Column("count", "most places", 0), *names)
    caption = f"{run.label}: acceptance of the first drafted token by {title}"
    return Table(f"{key.replace('_', '-')}-{place}", caption, columns, list(rows.values()))


def _range(each: dict[str, Any]) -> str:
    high = each["high"]
    return f"from {each['low']:g}" + ("" if high is None else f" to below {high:g}")


def calibration(runs: Sequence[Run]) -> Section:
    """Reliability diagrams."""
    section = Section("calibration", "Calibration")
    for place, run in enumerate(_analyses(runs, section), start=1):
        shown = [d for d in run.data["drafters"] if (d["calibration"] or {}).get("bins")]
        if not shown:
            section.missing.append(f"No drafter of {run.label} tells how sure it is.")
            continue
        said = "; ".join(f"{d['name']} {d['calibration']['ece']:.3f}" for d in shown)
        section.figures.append(
            Figure(
                f"calibration-{place}",
                f"{run.label}: acceptance of drafted tokens by the drafter's confidence. A point "
                "is as large as its share of the tokens; below the diagonal the drafter is too "
                "sure.",
                f"Reliability diagrams, a panel a drafter. Expected calibration errors: {said}.",
                reliability(shown),
            )
        )
    return section


def hardest(runs: Sequence[Run]) -> Section:
    """Places where drafter and target agree least."""
    section = Section("hardest", "Hardest contexts")
    found = _analyses(runs, section)
    if found:
        section.text.append(
            "Places where the laws of drafter and target overlap least, in the text as it went "
            "on: what the drafter held for likeliest and the target rejects is struck out, what "
            f"came instead is bold and underlined twice. At most {_HARDEST} of each drafter."
        )
    for run in found:
        for drafter in run.data["drafters"]:
            section.contexts += [_context(drafter, h) for h in drafter["hardest"][:_HARDEST]]
    return section


def _context(drafter: dict[str, Any], place: dict[str, Any]) -> Context:
    return Context(
        drafter=drafter["name"],
        where=f"prompt {place['prompt']}, token {place['position']} of the answer",
        before=f"… {place['before']}",
        rejected=_visible("".join(place["drafted"])),
        target=_visible(place["target"]),
        note=f"The token that came: p {place['p']:.3g} (target), q {place['q']:.3g} (drafter); "
        f"overlap of the laws {place['overlap']:.3g}.",
    )


def _visible(token: str) -> str:
    """A token whose blanks can be seen where it has nothing else."""
    return token if token.strip() else token.replace(" ", "␣").replace("\n", "↵") or "(no text)"
