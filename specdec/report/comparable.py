"""Which runs may be set side by side: everything but the drafters has to be the same."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.checkpoints.identity import SIZES, differences, identity_of
from specdec.common.stats import Work, Works, total_speed
from specdec.report.blocks import Column, Section, Table
from specdec.report.runs import Run


@dataclass(frozen=True)
class Difference:
    """Something in which two runs differ.

    Attributes:
        field: what `--allow` takes.
        key: the setting, which is part of the field.
        values: of the first and of the other run, as text.
        fix: what makes them equal.
    """

    field: str
    key: str
    values: tuple[str, str]
    fix: str


_Reader = Callable[[Run], dict[str, Any]]


def _config(*keys: str) -> _Reader:
    return lambda run: {key: run.config.get(key) for key in keys}


def _provenance(*keys: str) -> _Reader:
    return lambda run: {key: run.provenance.get(key) for key in keys}


def _schema(run: Run) -> dict[str, Any]:
    return {"schema": run.data["schema"]}


def _sampling(run: Run) -> dict[str, Any]:
    return {f"sampling.{key}": v for key, v in (run.config.get("sampling") or {}).items()}


def _seed(run: Run) -> dict[str, Any]:
    """At temperature 0 nothing is drawn."""
    drawn = (run.config.get("sampling") or {}).get("temperature")
    return {"seed": run.config.get("seed")} if drawn else {}


def _target(run: Run) -> dict[str, Any]:
    """The model itself where the run knows it; else where it was loaded from."""
    identity = run.identity
    if identity is None:
        path = (run.config.get("target") or {}).get("path")
        return {"target.path": path}
    names = ["weights", "tokenizer"]
    if None in (identity["weights"], identity["tokenizer"]):
        names += ["name", "hidden_size", "vocab_size", "num_layers"]
    return {f"target.{name}": identity[name] for name in names}


def _facts(first: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """Facts that two targets differ in, beside their hashes and sizes."""
    ours, theirs = (identity_of(run.identity or {}) for run in (first, other))
    if ours.facts is None or theirs.facts is None:
        return []
    found = differences(ours, theirs, "", "")
    return [each for each in found if each[0] not in (*SIZES, "weights", "tokenizer")]


def _number_format(run: Run) -> dict[str, Any]:
    where = run.config.get("target") or {}
    return {**_provenance("dtype", "quantized")(run), "quantization": where.get("quantization")}


def _prompts(run: Run) -> dict[str, Any]:
    prompts = run.data.get("prompts")
    if prompts is None:
        chosen = run.config.get("prompts") or {}
        return {f"prompts.{key}": chosen.get(key) for key in ("source", "num", "seed")}
    marks = " ".join(sorted(each["fingerprint"] for each in prompts))
    short = hashlib.sha256(marks.encode()).hexdigest()[:12]
    return {"prompts": f"{len(prompts)} prompts with the fingerprint {short}"}


# Field -> how it is read, and what makes two runs agree.
FIELDS: dict[str, tuple[_Reader, str]] = {
    "schema": (_schema, "run the older one again"),
    "target": (_target, "run both with the same target.path"),
    "prompts": (_prompts, "run both with the same prompts.source, prompts.num and prompts.seed"),
    "sampling": (_sampling, "run both with the same sampling"),
    "seed": (_seed, "run both with the same seed"),
    "max_new_tokens": (_config("max_new_tokens"), "run both with the same max_new_tokens"),
    "batch_size": (
        _config("batch_size", "prompts_per_call"),
        "run both with the same batch_size and prompts_per_call",
    ),
    "rule": (_config("rule"), "run both with the same rule"),
    "dtype": (_number_format, "run both with the same target.dtype and target.quantization"),
    "device": (_provenance("device", "cpu", "cpu_count"), "run both on the same machine"),
    "threads": (_provenance("threads"), "run both with the same threads"),
    "processes": (_provenance("processes"), "run both on the same number of processes"),
}


def find_differences(
    first: Run, other: Run, fields: Sequence[str] = tuple(FIELDS)
) -> list[Difference]:
    """Every difference that makes figures of two runs incomparable.

    What only one of them knows is not compared: an older version did not write it down.
    """
    found = []
    for field in fields:
        read, fix = FIELDS[field]
        ours, theirs = read(first), read(other)
        found += [
            Difference(field, key, (str(ours[key]), str(theirs[key])), fix)
            for key in ours
            if key in theirs and _differ(ours[key], theirs[key])
        ]
        if field == "target":
            found += [
                Difference(field, f"target.{key}", (str(a), str(b)), fix)
                for key, a, b in _facts(first, other)
            ]
    return found


def _differ(ours: Any, theirs: Any) -> bool:
    return None not in (ours, theirs) and bool(ours != theirs)


def check_comparable(
    runs: Sequence[Run], allowed: Sequence[str] = ()
) -> dict[str, list[Difference]]:
    """Refuse runs that may not be set side by side.

    Args:
        runs: benches; each is compared with the first.
        allowed: fields that may differ all the same.

    Returns:
        The differences that were allowed, by label of the run.

    Raises:
        ValueError: no such field, or runs differ in a field that was not allowed.
    """
    unknown = [field for field in allowed if field not in FIELDS]
    if unknown:
        raise ValueError(f"--allow is {unknown[0]!r} but must be one of {', '.join(FIELDS)}")
    kept: dict[str, list[Difference]] = {}
    for other in runs[1:]:
        found = find_differences(runs[0], other)
        refused = [each for each in found if each.field not in allowed]
        if refused:
            raise ValueError(_refusal(runs[0].label, other.label, refused))
        if found:
            kept[other.label] = found
    return kept


# Runs of these kinds are shown one after the other, never as a ratio: a reader compares them.
_SHOWN_TOGETHER = {
    "analysis": ("target", "prompts", "sampling", "seed", "max_new_tokens", "dtype"),
    "sweep": tuple(FIELDS),
    "suite": tuple(FIELDS),
}


def not_alike(runs: Sequence[Run]) -> list[str]:
    """What readers must know of runs of one kind, other than benches, before they compare them.

    Args:
        runs: all of a report.
    """
    found = []
    firsts: dict[tuple[str, str], Run] = {}
    for run in runs:
        fields = _SHOWN_TOGETHER.get(run.kind)
        first = firsts.setdefault((run.kind, str(run.data.get("suite"))), run)
        if fields is None or first is run:
            continue
        said = "; ".join(
            f"{each.key} is {each.values[0]} and {each.values[1]}"
            for each in find_differences(first, run, fields)
        )
        if said:
            found.append(f"Do not compare {first.label} with {run.label}: {said}.")
    return found


def _refusal(first: str, other: str, refused: Sequence[Difference]) -> str:
    said = "; ".join(
        f"{each.key} is {each.values[0]!r} in {first!r} and {each.values[1]!r} in {other!r}"
        for each in refused
    )
    fixes = "; ".join(dict.fromkeys(each.fix for each in refused))
    allow = " ".join(f"--allow {field}" for field in dict.fromkeys(e.field for e in refused))
    return f"runs that are not comparable: {said}. To compare them, {fixes}; or pass {allow}"


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
