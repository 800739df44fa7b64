"""Two benches side by side: the same arm, the same prompts, one ratio."""

from collections.abc import Sequence
from typing import Any

from specdec.bench.speed import Work, Works, total_speed
from specdec.report.blocks import Column, Section, Table
from specdec.report.comparable import Difference
from specdec.report.runs import Run


def comparison(runs: Sequence[Run], allowed: dict[str, list[Difference]]) -> Section:
    """Every other run against the first.

    Args:
        runs: at least two benches, which `check_comparable` let pass.
        allowed: what it returned.
    """
    section = Section("comparison", "Comparison of runs")
    first, *others = runs
    section.text.append(
        f"Each run against {first.label}. Ratios are of total times of the same arm on the prompts "
        "that both have; above 1 the other run is faster. Speed is compared twice: in tokens per "
        "second, which feels whatever else the machine did, and as speedup over the plain decoding "
        "of the same run."
    )
    section.tables.append(_differences(first, others, allowed))
    for place, other in enumerate(others):
        section.tables.append(_pairs(first, other, place))
        section.missing += _missing(first, other)
    return section


def paired_works(runs: Sequence[Run], arms: Sequence[str]) -> list[Works]:
    """Decoding of each arm in each run, on the prompts that every run has decoded with them all."""
    found = [_by_prompt(run, arm) for run in runs for arm in arms]
    shared = [mark for mark in found[0] if all(mark in each for each in found)]
    return [[each[mark] for mark in shared] for each in found]


def _by_prompt(run: Run, name: str) -> dict[Any, Work]:
    """Decoding by prompt; the same prompt twice is told apart by its turn."""
    arm = _arms(run)[name]
    if "per_prompt" not in arm or "prompts" not in run.data:
        return {}
    found: dict[Any, Work] = {}
    seen: dict[str, int] = {}
    for prompt, figures in zip(run.data["prompts"], arm["per_prompt"], strict=True):
        mark = prompt["fingerprint"]
        seen[mark] = seen.get(mark, 0) + 1
        if figures is not None and figures["decode_s"]:
            found[mark, seen[mark]] = Work(figures["decode_tokens"], figures["decode_s"])
    return found


def _arms(run: Run) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in run.arms}


def _pairs(first: Run, other: Run, place: int) -> Table:
    ours, theirs = _arms(first), _arms(other)
    rows = [_pair(first, other, ours[name], theirs[name], name) for name in ours if name in theirs]
    columns = [
        Column("arm", "arm"),
        Column("tau", f"tau, {first.label}", 2),
        Column("other_tau", f"tau, {other.label}", 2),
        Column("speedup", f"speed / plain, {first.label}", 2, "x"),
        Column("other_speedup", f"speed / plain, {other.label}", 2, "x"),
        Column("prompts", "prompts paired", 0),
        Column("decode_tokens_per_s", "tokens/s, ratio", 3),
        Column("speedup_vs_plain", "speedup, ratio", 3),
    ]
    return Table(f"pairs-{place + 1}", f"{other.label} against {first.label}", columns, rows)


def _pair(first: Run, other: Run, ours: dict, theirs: dict, name: str) -> dict[str, Any]:
    old, old_plain, new, new_plain = paired_works((first, other), (name, "plain"))
    return {
        "arm": name,
        "tau": ours["tau"],
        "tau_ci": ours["tau_ci"],
        "other_tau": theirs["tau"],
        "other_tau_ci": theirs["tau_ci"],
        "speedup": ours["speedup_vs_plain"],
        "speedup_ci": ours["speedup_vs_plain_ci"],
        "other_speedup": theirs["speedup_vs_plain"],
        "other_speedup_ci": theirs["speedup_vs_plain_ci"],
        "prompts": len(old) or None,
        **total_speed("decode_tokens_per_s", [new], [old]),
        **total_speed("speedup_vs_plain", [new, old_plain], [new_plain, old]),
    }


def _differences(first: Run, others: Sequence[Run], allowed: dict[str, list]) -> Table:
    """What was allowed to differ, and what may differ but should be known."""
    rows = []
    for other in others:
        for each in allowed.get(other.label, ()):
            rows.append(_difference(other, each.key, each.values, f"allowed: --allow {each.field}"))
        for key, values in _harmless(first, other):
            rows.append(_difference(other, key, values, "does not forbid a comparison"))
    columns = [
        Column("run", "run"),
        Column("key", "differs in"),
        Column("first", f"in {first.label}"),
        Column("other", "in this run"),
        Column("note", ""),
    ]
    caption = "In what the runs differ" if rows else "The runs differ in nothing that is recorded"
    return Table("differences", caption, columns, rows)


def _difference(other: Run, key: str, values: tuple[str, str], note: str) -> dict[str, Any]:
    return {"run": other.label, "key": key, "first": values[0], "other": values[1], "note": note}


def _harmless(first: Run, other: Run) -> list[tuple[str, tuple[str, str]]]:
    """Commit, versions, load, and the options of arms that share a name."""
    ours, theirs = _known(first), _known(other)
    return [
        (key, (str(ours.get(key)), str(theirs.get(key))))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]


def _known(run: Run) -> dict[str, Any]:
    where = run.provenance
    names = ("git_commit", "git_dirty", "date", "load_average")
    arms = run.config.get("arms") or ()
    return {
        **{name: where.get(name) for name in names},
        **{f"version of {name}": v for name, v in (where.get("versions") or {}).items()},
        "repeats": run.config.get("repeats"),
        **{f"arm {arm['name']}": _arm_text(arm) for arm in arms},
    }


def _arm_text(arm: dict[str, Any]) -> str:
    limit = arm.get("draft_length")
    parts = [arm["type"], arm["options"], limit and f"draft_length {limit}"]
    return " ".join(str(part) for part in parts if part)


def _missing(first: Run, other: Run) -> list[str]:
    ours, theirs = _arms(first), _arms(other)
    found = []
    for run, alone in ((first, set(ours) - set(theirs)), (other, set(theirs) - set(ours))):
        if alone:
            found.append(f"Arms that only {run.label} has: {', '.join(sorted(alone))}.")
    older = [run.label for run in (first, other) if not run.is_bench(2)]
    if older:
        found.append(
            f"No ratios paired by prompt: {' and '.join(older)} of the first version of results "
            "has no figures by prompt; run it again."
        )
    elif not any(paired_works((first, other), [name])[0] for name in ours if name in theirs):
        found.append(f"No ratios paired by prompt: {first.label} and {other.label} share none.")
    return found
