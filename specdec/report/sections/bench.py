"""What was measured: arms, domains, speed against tau, acceptance by depth."""

from collections.abc import Sequence
from typing import Any

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.figures.acceptance import acceptance_by_depth
from specdec.report.figures.speed import speed_against_tau
from specdec.report.runs import Run, cells

NO_BENCH = "No bench among the runs: give the --out folder of specdec bench."

_OLD = (
    "{} is of the first version of results, which has no figures by prompt: intervals of speeds, "
    "and in a batch the speeds but for the mean of ratios, take another run."
)

_ARM = Column("name", "arm")
_HEADLINE = (
    Column("tau", "tau", 2, term="tau"),
    Column("decode_tokens_per_s", "tokens/s", 0, term="speed"),
    Column("speedup_vs_plain", "speed / plain", 2, "x", term="speedup"),
    Column("speedup_vs_hf", "speed / HF", 2, "x", term="hf"),
)
_BESIDE = (
    Column("end_to_end_speedup_vs_plain", "with prefill / plain", 2, "x", term="whole"),
    Column("mean_speedup_vs_plain", "mean ratio", 2, "x", term="mean_ratio"),
)
_COUNTS = (
    Column("accepted_percent", "accepted", 0, " %", term="accepted"),
    Column("loop_efficiency", "loop efficiency", 3, term="efficiency"),
    Column("prompts", "prompts", 0),
    Column("mismatches", "differ", 0, term="differ"),
    Column("failed", "failed", 0),
)


def results(runs: Sequence[Run]) -> Section:
    """Every arm of every bench and sweep."""
    section = Section("results", "Results")
    benches = [run for run in runs if run.kind == "bench"]
    sweeps = [run for run in runs if run.kind == "sweep"]
    if not benches and not sweeps:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        rows = [_row(arm) for arm in run.arms]
        columns = (_ARM, *_HEADLINE, *_BESIDE, *_COUNTS)
        section.tables.append(Table(f"arms-{place}", f"{run.label}: all prompts", columns, rows))
        section.text += _failures(run)
        if not run.is_bench(2):
            section.missing.append(_OLD.format(run.label))
    for place, run in enumerate(sweeps, start=1):
        section.tables.append(_sweep(run, place))
        section.missing += [
            f"The cell {each['name']} of {run.label} failed: {each['error']}"
            for each in run.data["cells"]
            if each.get("error")
        ]
    return section


def _row(arm: dict[str, Any]) -> dict[str, Any]:
    rate = arm["acceptance_rate"]
    return {**arm, "accepted_percent": rate and 100 * rate}


def _failures(run: Run) -> list[str]:
    return [
        f"{run.label}: {arm['failed']} of {arm['prompts']} prompts of {arm['name']} failed and are "
        f"not timed: {arm['failures'][0]['reason']}"
        for arm in run.arms
        if arm["failed"]
    ]


def _sweep(run: Run, place: int) -> Table:
    keys = list(dict.fromkeys(key for cell in run.data["cells"] for key in cell["settings"]))
    rows = [
        {**_row(arm), **{f"set {key}": str(value) for key, value in cell["settings"].items()}}
        for cell in run.data["cells"]
        for arm in cell["arms"]
    ]
    set_here = [Column(f"set {key}", key.rpartition(".")[2]) for key in keys]
    columns = (*set_here, _ARM, *_HEADLINE, *_BESIDE)
    return Table(f"sweep-{place}", f"{run.label}: every cell", columns, rows)


def domains(runs: Sequence[Run]) -> Section:
    """Every arm in every domain."""
    section = Section("domains", "By task")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        if run.is_bench(2):
            section.tables.append(_domains(run, place))
        else:
            section.missing.append(
                f"{run.label} is of the first version of results, which does not tell tasks apart; "
                "run it again."
            )
    return section


def _domains(run: Run, place: int) -> Table:
    names = dict.fromkeys(name for arm in run.arms for name in arm["domains"])
    rows = [
        {"domain": name, "name": arm["name"], **arm["domains"][name]}
        for name in names
        for arm in run.arms
        if name in arm["domains"]
    ]
    columns = (Column("domain", "task"), _ARM, Column("prompts", "prompts", 0), *_HEADLINE)
    return Table(f"domains-{place}", f"{run.label}: each task by itself", columns, rows)


def speed(runs: Sequence[Run]) -> Section:
    """A picture a bench."""
    section = Section("speed", "Speed against tau")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        arms = [arm for arm in run.arms if arm["tau"] and arm["speedup_vs_plain"]]
        if not arms:
            section.missing.append(f"{run.label} has no arm with a tau and a speed.")
            continue
        said = [f"{a['name']} {a['tau']:.2f} and {a['speedup_vs_plain']:.2f}x" for a in arms]
        section.figures.append(
            Figure(
                f"speed-{place}",
                f"{run.label}: what tau promises and what arrives. Bars are 95 % intervals over "
                "prompts.",
                f"Scatter plot of speed over plain decoding against tau. {'; '.join(said)}.",
                speed_against_tau(arms),
            )
        )
    return section


def acceptance(runs: Sequence[Run]) -> Section:
    """A picture and a table a bench."""
    section = Section("acceptance", "Acceptance by depth")
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    for place, run in enumerate(benches, start=1):
        arms = [arm for arm in run.arms if arm["per_depth"]]
        if not arms:
            section.missing.append(f"No arm of {run.label} drafted anything.")
            continue
        curves = [(a["name"], a["per_depth"], a["per_depth_conditional"]) for a in arms]
        alt = "; ".join(f"{a['name']} from {a['per_depth'][0]:.2f} at depth 1" for a in arms)
        section.figures.append(
            Figure(
                f"acceptance-{place}",
                f"{run.label}: above, of all steps (the sum is tau - 1); below, of the steps that "
                "tested the depth.",
                f"Two line plots of acceptance by depth. {alt}.",
                acceptance_by_depth(curves),
            )
        )
        section.tables.append(_depths(run, arms, place))
    return section


def _depths(run: Run, arms: Sequence[dict[str, Any]], place: int) -> Table:
    rows = []
    for arm in arms:
        for key, kind in (("per_depth", "all"), ("per_depth_conditional", "conditional")):
            values = {str(depth): value for depth, value in enumerate(arm[key], start=1)}
            rows.append({"name": arm["name"], "kind": kind, **values})
    deepest = max(len(arm["per_depth"]) for arm in arms)
    depths = [Column(str(depth), str(depth), 2) for depth in range(1, deepest + 1)]
    columns = (_ARM, Column("kind", "share of steps", term="conditional"), *depths)
    return Table(f"depths-{place}", f"{run.label}: acceptance by depth", columns, rows)


def measured(runs: Sequence[Run]) -> list[Run]:
    """Benches, and the cells of sweeps as benches."""
    found = []
    for run in runs:
        found += cells(run) if run.kind == "sweep" else [run] if run.kind == "bench" else []
    return found
