"""Where the time went, and where the speedup went."""

from collections.abc import Sequence

from specdec.report.blocks import Column, Figure, Section, Table
from specdec.report.breakdown import PART_NAMES, PARTS, Breakdown, Waterfall, breakdown, waterfall
from specdec.report.figures.time import time_bars, waterfalls
from specdec.report.runs import Run
from specdec.report.sections.bench import NO_BENCH

_OLD = (
    "{} is of the first version of results, which did not time verify and commit: both are in the "
    "rest of the loop. The number of steps is derived from tau and tokens."
)


def time(runs: Sequence[Run]) -> Section:
    """Milliseconds of a token by part."""
    section = Section("time", "Where the time went")
    section.text.append(
        "Decoding without prefill, milliseconds per emitted token; a batch's time is shared by "
        "its rows. Target and draft are forwards, verify is the processing of logits and the "
        "judging, commit the keeping of what was accepted."
    )
    for place, (run, found) in enumerate(_timed(runs, section), start=1):
        alt = "; ".join(f"{each.name} {sum(each.token_ms.values()):.2f} ms" for each in found)
        section.figures.append(
            Figure(
                f"time-{place}",
                f"{run.label}: milliseconds per emitted token.",
                f"Stacked bars of the time of a token by part. In all: {alt}.",
                time_bars(found),
            )
        )
        section.tables.append(_times(run, found, place))
    return section


def _times(run: Run, found: Sequence[Breakdown], place: int) -> Table:
    parts = [part for part in PARTS if any(part in each.step_ms for each in found)]
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
    columns = (
        Column("name", "arm"),
        Column("tau", "tau", 2, term="tau"),
        *(Column(part, PART_NAMES[part], 3) for part in parts),
        Column("token", "token in all", 3),
        Column("step", "step in all", 3),
    )
    return Table(f"times-{place}", f"{run.label}: ms per token, and per step", columns, rows)


def speedup(runs: Sequence[Run]) -> Section:
    """From tau down to the measured ratio."""
    section = Section("speedup", "Where the speedup went")
    section.text.append(
        "If a step cost what a step of plain decoding costs, and nothing else, the speedup would "
        "be tau. Each part of the step is then added to that cost in the order shown; its factor "
        "is the cost before over the cost after. The last factor is what lies outside of steps: "
        "the time between them, in a batch the wait for other rows, and that the speedup takes "
        "each prompt's median over repeats. Tau times all factors is the measured speedup."
    )
    for place, (run, found) in enumerate(_timed(runs, section), start=1):
        falls = _waterfalls(run, found)
        if not falls:
            section.missing.append(f"{run.label} has no arm with a speedup to explain.")
            continue
        alt = "; ".join(f"{each.name} from {each.tau:.2f} to {each.measured:.2f}" for each in falls)
        section.figures.append(
            Figure(
                f"speedup-{place}",
                f"{run.label}: from tau to the measured speedup.",
                f"Waterfalls, a panel an arm. {alt}.",
                waterfalls(falls),
            )
        )
        section.tables.append(_factors(run, falls, place))
    return section


def _waterfalls(run: Run, found: Sequence[Breakdown]) -> list[Waterfall]:
    arms = {arm["name"]: arm for arm in run.arms}
    plain = next((each for each in found if each.name == "plain"), None)
    if plain is None:
        return []
    falls = [waterfall(arms[each.name], each, plain) for each in found if each.name != "plain"]
    return [fall for fall in falls if fall is not None]


def _factors(run: Run, falls: Sequence[Waterfall], place: int) -> Table:
    names = list(dict.fromkeys(name for fall in falls for name, _ in fall.factors))
    rows = [
        {"name": f.name, "tau": f.tau, **dict(f.factors), "measured": f.measured} for f in falls
    ]
    columns = (
        Column("name", "arm"),
        Column("tau", "tau", 3, term="tau"),
        *(Column(name, f"x {name}", 3) for name in names),
        Column("measured", "= measured", 3, "x", term="speedup"),
    )
    return Table(f"factors-{place}", f"{run.label}: factors of the speedup", columns, rows)


def _timed(runs: Sequence[Run], section: Section) -> list[tuple[Run, list[Breakdown]]]:
    """Benches with their breakdowns; what cannot be broken down is told in the section."""
    benches = [run for run in runs if run.kind == "bench"]
    if not benches:
        section.missing.append(NO_BENCH)
    timed = []
    for run in benches:
        found = [breakdown(arm, run.config["repeats"]) for arm in run.arms]
        kept = [each for each in found if each is not None]
        without = [arm["name"] for arm, each in zip(run.arms, found, strict=True) if each is None]
        if without:
            section.missing.append(
                f"{run.label}: no times of steps of {', '.join(without)}: the loop is not ours."
            )
        if not run.is_bench(2):
            section.missing.append(_OLD.format(run.label))
        if kept:
            timed.append((run, kept))
    return timed
