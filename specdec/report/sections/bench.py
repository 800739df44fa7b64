"""Sections of benches and sweeps: arms, tasks, speed, acceptance, times."""

from typing import Any

from specdec.bench.config import in_words, short_names
from specdec.bench.results import BenchArm, BenchResults, SweepResults
from specdec.report.breakdown import PARTS, Breakdown, break_down, explain_speedup
from specdec.report.document import Section
from specdec.report.figures.bench import (
    acceptance_by_depth,
    speed_against_tau,
    time_bars,
    waterfalls,
)
from specdec.report.runs import Run, last_part, title_of
from specdec.report.tables import Column, Table

ARM = Column("name", "arm")
TAU = Column("tau", "tau", 2, term="tau", rank=2)
SPEED = Column("decode_tokens_per_s", "tokens\n/s", 0, term="speed")
VS_PLAIN = Column("speedup_vs_plain", "vs\nplain", 2, term="speedup", rank=3)
WITH_PREFILL = Column("end_to_end_speedup_vs_plain", "with\nprefill", 2, term="whole")
ACCEPTED = Column("acceptance_rate", "acc.", 0, "%", scale=100, term="accepted")
EFFICIENCY = Column("loop_efficiency", "loop\neff.", 3, term="efficiency")
CHECKS = [
    Column("mismatches", "differ", 0, term="differ"),
    Column("failed", "failed", 0),
]
_VS_HF = Column("speedup_vs_hf", "vs\nHF", 2, term="hf", rank=1)
_MEAN_RATIO = Column("mean_speedup_vs_plain", "mean ratio", 2, term="mean_ratio", is_wide=True)


def results_table(results: BenchResults, label: str = "") -> Table:
    """Show one row an arm."""
    gaps = [each.top2_gap for arm in results.arms for each in arm.differences]
    known = [gap for gap in gaps if gap is not None]
    apart = f"the two best logits where outputs part are at most {max(known, default=0):.2g} apart"
    return Table(
        id="arms",
        caption=label + title_of(results),
        columns=[
            *(ARM, TAU, ACCEPTED, SPEED, VS_PLAIN, _VS_HF, WITH_PREFILL, _MEAN_RATIO, EFFICIENCY),
            Column("prompts", "prompts", 0, is_wide=True),
            *CHECKS,
        ],
        rows=[row_of(arm) for arm in results.arms],
        legend=[
            "acc.: accepted / drafted; speeds are of total times",
            "HF: transformers' generate; differ: prompts whose greedy tokens differ",
            *([apart] if known else []),
        ],
    )


def row_of(arm: Any) -> dict[str, Any]:
    """Give the figures of an arm; one that drafts nothing has no share of accepted tokens."""
    return {**vars(arm), "acceptance_rate": arm.acceptance_rate or None}


def sweep_table(sweep: SweepResults, label: str = "") -> Table:
    """Show one row an arm of a cell, with the domains where there are several."""
    titles = short_names(list(sweep.cells[0].settings))
    arms = [arm for cell in sweep.cells for arm in cell.arms]
    domains = list(dict.fromkeys(name for arm in arms for name in arm.domains))
    if all(len(arm.domains) < 2 for arm in arms):
        domains = []
    by_domain = "; by domain: tau and speed / plain decoding" if domains else ""
    rows = []
    for cell in sweep.cells:
        settings = {key: last_part(in_words(value)) for key, value in cell.settings.items()}
        # What failed before it measured anything keeps its place in the table.
        kept: list[BenchArm | None] = [*cell.arms] or [None]
        for arm in kept:
            shares = {f"domain {name}": _domain(arm, name) for name in domains}
            rows.append({**settings, "name": "failed", **(vars(arm) if arm else {}), **shares})
    return Table(
        id="sweep",
        caption=f"{label}{len(sweep.cells)} cells{by_domain}",
        columns=[
            *(Column(key, title.replace("_", "\n")) for key, title in titles.items()),
            *(ARM, TAU, SPEED, VS_PLAIN, _VS_HF),
            *(Column(f"domain {name}", name, is_optional=True) for name in domains),
        ],
        rows=rows,
        num_grouped=len(titles),
    )


def _domain(arm: Any, name: str) -> str | None:
    found = arm and arm.domains.get(name)
    if not found:
        return None
    return "  ".join("-" if x is None else f"{x:.2f}" for x in (found.tau, found.speedup_vs_plain))


def add_results(section: Section, run: Run) -> None:
    """Show every arm of a bench, or of a sweep's cells."""
    if run.kind == "sweep":
        section.show(sweep_table(run.data, f"{run.label}: "))
        section.missing += [
            f"The cell {cell.name} of {run.label} failed: {cell.error}"
            for cell in run.data.cells
            if cell.error
        ]
        return
    section.show(results_table(run.data, f"{run.label}: "))
    section.text += [
        f"{run.label}: {arm.failed} of {arm.prompts} prompts of {arm.name} failed and are not "
        f"timed: {arm.failures[0].reason}"
        for arm in run.data.arms
        if arm.failed
    ]
    if all(arm.per_prompt is None for arm in run.data.arms):
        section.missing.append(
            f"{run.label} is of the first version of results, without figures by prompt or task, "
            "or times of verify and commit: for intervals of speeds, and in a batch for speeds but "
            "the mean ratio, run it again."
        )


def add_domains(section: Section, run: Run) -> None:
    """Show every arm in every domain."""
    rows = [
        {"domain": name, "arm": arm.name, **vars(figures)}
        for name in dict.fromkeys(name for arm in run.data.arms for name in arm.domains)
        for arm in run.data.arms
        if (figures := arm.domains.get(name))
    ]
    if not rows:
        section.missing.append(f"{run.label} does not tell tasks apart; run it again.")
        return
    columns = [Column("domain", "task"), Column("arm", "arm"), Column("prompts", "prompts", 0)]
    columns += [TAU, SPEED, VS_PLAIN, _VS_HF]
    section.tabulate("domains", f"{run.label}: each task by itself", columns, rows)


def add_speed(section: Section, run: Run) -> None:
    """Draw speed against tau."""
    arms = [arm for arm in run.data.arms if arm.tau and arm.speedup_vs_plain]
    if not arms:
        section.missing.append(f"{run.label} has no arm with a tau and a speed.")
        return
    said = "; ".join(f"{arm.name} {arm.tau:.2f} and {arm.speedup_vs_plain:.2f}x" for arm in arms)
    section.draw(
        "speed",
        f"{run.label}: the speed that tau promises, and the speed that arrives. Bars are 95 % "
        "intervals over prompts.",
        f"Scatter plot of speed over plain decoding against tau. {said}.",
        speed_against_tau(arms),
    )


def add_acceptance(section: Section, run: Run) -> None:
    """Draw and list acceptance by depth."""
    arms = [arm for arm in run.data.arms if arm.per_depth]
    if not arms:
        section.missing.append(f"No arm of {run.label} drafted anything.")
        return
    said = "; ".join(f"{arm.name} from {arm.per_depth[0]:.2f} at depth 1" for arm in arms)
    section.draw(
        "acceptance",
        f"{run.label}: above, of all steps (the sum is tau - 1); below, of the steps that tested "
        "the depth.",
        f"Two line plots of acceptance by depth. {said}.",
        acceptance_by_depth([(a.name, a.per_depth, a.per_depth_conditional) for a in arms]),
    )
    rows = [
        {"name": arm.name, "kind": kind, **{str(n): v for n, v in enumerate(values, start=1)}}
        for arm in arms
        for kind, values in (("all", arm.per_depth), ("conditional", arm.per_depth_conditional))
    ]
    deepest = max(len(arm.per_depth) for arm in arms)
    depths = [Column(str(depth), str(depth), 2) for depth in range(1, deepest + 1)]
    columns = [ARM, Column("kind", "share of steps", term="conditional"), *depths]
    section.tabulate("depths", f"{run.label}: acceptance by depth", columns, rows)


def add_time(section: Section, run: Run) -> None:
    """Show milliseconds of a token by part."""
    found = _breakdowns(run)
    without = [arm.name for arm in run.data.arms if arm.name not in {each.name for each in found}]
    if without:
        section.missing.append(
            f"{run.label}: no times of steps of {', '.join(without)}: the loop is not ours."
        )
    if not found:
        return
    said = "; ".join(f"{each.name} {sum(each.token_ms.values()):.2f} ms" for each in found)
    section.draw(
        "time",
        f"{run.label}: milliseconds per emitted token.",
        f"Stacked bars of the time of a token by part. In all: {said}.",
        time_bars(found),
    )
    rows = [
        {
            "name": each.name,
            "tau": each.tau,
            **each.token_ms,
            "token": sum(each.token_ms.values()),
            "step": sum(each.step_ms.values()),
        }
        for each in found
    ]
    columns = [
        *(ARM, TAU),
        *(Column(part, name, 3, is_optional=True) for part, name in PARTS.items()),
        *(Column("token", "token in all", 3), Column("step", "step in all", 3)),
    ]
    section.tabulate("times", f"{run.label}: ms per token, and per step", columns, rows)


def add_speedup(section: Section, run: Run) -> None:
    """Show the way from tau down to the measured speedup."""
    arms = {arm.name: arm for arm in run.data.arms}
    found = {each.name: each for each in _breakdowns(run)}
    plain = found.pop("plain", None)
    explained = (explain_speedup(arms[name], each, plain) for name, each in found.items() if plain)
    falls = [fall for fall in explained if fall is not None]
    if not falls:
        section.missing.append(f"{run.label} has no arm with a speedup to explain.")
        return
    said = "; ".join(f"{each.name} from {each.tau:.2f} to {each.measured:.2f}" for each in falls)
    section.draw(
        "speedup",
        f"{run.label}: from tau to the measured speedup.",
        f"Waterfalls, a panel an arm. {said}.",
        waterfalls(falls),
    )
    columns = [
        *(ARM, Column("tau", "tau", 3, term="tau")),
        *(Column(f"factors.{name}", f"x {name}", 3) for name in falls[0].factors),
        Column("measured", "= measured", 3, term="speedup"),
    ]
    section.tabulate("factors", f"{run.label}: factors of the speedup", columns, falls)


def _breakdowns(run: Run) -> list[Breakdown]:
    found = [break_down(arm, run.config["repeats"]) for arm in run.data.arms]
    return [each for each in found if each is not None]
