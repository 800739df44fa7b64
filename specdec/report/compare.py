"""Settings of runs, and comparison of runs: everything but the drafters has to be the same."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from specdec.common.stats import Work, total_speed
from specdec.report.document import Section
from specdec.report.runs import Run, last_part
from specdec.report.tables import Column, Table, lookup

# Fields that `--allow` takes -> keys of a run that must agree; only what both know is compared.
MUST_AGREE = {
    "target": ("target",),
    "prompts": ("prompts",),
    "sampling": ("config.sampling",),
    "seed": ("seed",),
    "max_new_tokens": ("config.max_new_tokens",),
    "batch_size": ("config.batch_size", "config.prompts_per_call"),
    "rule": ("config.rule",),
    "dtype": ("dtype", "quantized", "config.target.quantization", "config.target.cache"),
    "device": ("device", "cpu", "cpu_count"),
    "threads": ("threads",),
    "processes": ("processes",),
    "compile_mode": ("compile_mode",),
}
# An analysis depends on no machine; a plan is of one target on one machine.
_ANALYSIS_FIELDS = ("target", "prompts", "sampling", "seed", "max_new_tokens", "dtype")
PLAN_FIELDS = ("target", "sampling", "rule", "dtype", "device", "threads", "compile_mode")


class Difference(NamedTuple):
    """A setting that two runs know and that differs; `field` is what `--allow` takes."""

    field: str
    key: str
    first: Any
    other: Any


def find_differences(
    first: Run, other: Run, fields: Collection[str] = tuple(MUST_AGREE)
) -> list[Difference]:
    ours, theirs = _comparable(first), _comparable(other)
    return [
        Difference(field, *each)
        for field in fields
        for key in MUST_AGREE[field]
        for each in _differing(key.removeprefix("config."), lookup(ours, key), lookup(theirs, key))
    ]


def _comparable(run: Run) -> dict[str, Any]:
    config, identity = run.config, run.identity
    target, prompts = {"path": lookup(config, "target.path")}, config.get("prompts")
    if identity is not None:  # it tells the model itself, wherever it was loaded from
        keys = ["weights", "tokenizer", "hidden_size", "vocab_size", "num_layers"]
        if None in (identity.get("weights"), identity.get("tokenizer")):
            keys.append("name")
        facts = {k: v for k, v in (identity.get("facts") or {}).items() if k != "quantization"}
        target = {key: identity.get(key) for key in keys} | facts
    if getattr(run.data, "prompts", None):
        marks = " ".join(sorted(each.fingerprint for each in run.data.prompts))
        short = hashlib.sha256(marks.encode()).hexdigest()[:12]
        prompts = f"{len(run.data.prompts)} prompts with the fingerprint {short}"
    seed = config.get("seed") if lookup(config, "sampling.temperature") else None
    return {**run.provenance, "target": target, "prompts": prompts, "seed": seed}


def _differing(key: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Give key and both values where both are known and differ, of mappings for each key."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        parts = (_differing(f"{key}.{name}", ours[name], theirs.get(name)) for name in ours)
        return list(chain.from_iterable(parts))
    return [] if None in (ours, theirs) or ours == theirs else [(key, ours, theirs)]


def check_comparable(runs: Sequence[Run], allowed: Sequence[str] = ()) -> list[str]:
    """Refuse benches that differ from the first; warns of differences that are allowed."""
    unknown = [field for field in allowed if field not in MUST_AGREE]
    if unknown:
        raise ValueError(f"--allow is {unknown[0]!r} but must be one of {', '.join(MUST_AGREE)}")
    warnings = []
    for other in runs[1:]:
        first, label = runs[0].label, other.label
        found = find_differences(runs[0], other)
        refused = [each for each in found if each.field not in allowed]
        if refused:
            said = "; ".join(
                f"{each.key} is {str(each.first)!r} in {first!r} and {str(each.other)!r} in "
                f"{label!r}"
                for each in refused
            )
            fields = list(dict.fromkeys(each.field for each in refused))
            raise ValueError(
                f"runs that are not comparable: {said}. Run both with the same "
                f"{', '.join(fields)}, or pass {' '.join(f'--allow {field}' for field in fields)}"
            )
        warnings += [
            f"{first} and {label} differ in {each.key}: {each.first} and {each.other}. They are "
            f"compared because --allow {each.field} was given; their figures are not of the same "
            "thing."
            for each in found
        ]
    return warnings


def comparable_groups(benches: Sequence[Run], allowed: Sequence[str] = ()) -> list[list[Run]]:
    """Group benches: all that were given, and each found one with those that it agrees with."""
    groups: list[list[Run]] = []
    fields = [field for field in MUST_AGREE if field not in allowed]
    for run in sorted(benches, key=lambda run: run.is_found):
        alike = [g for g in groups if not (run.is_found and find_differences(g[0], run, fields))]
        if alike:
            alike[0].append(run)
        else:
            groups.append([run])
    return [group for group in groups if len(group) > 1]


def warn_of_differences(runs: Sequence[Run]) -> list[str]:
    """Say which analyses, sweeps or suites a reader must not compare."""
    warnings = []
    firsts: dict[tuple[str, str], Run] = {}
    for run in runs:
        if run.kind in ("analysis", "sweep", "suite"):
            first = firsts.setdefault((run.kind, getattr(run.data, "suite", "")), run)
            fields = _ANALYSIS_FIELDS if run.kind == "analysis" else tuple(MUST_AGREE)
            found = find_differences(first, run, fields)
            said = "; ".join(f"{each.key} is {each.first} and {each.other}" for each in found)
            if said:
                warnings.append(f"Do not compare {first.label} with {run.label}: {said}.")
    return warnings


def add_comparison(section: Section, runs: Sequence[Run]) -> None:
    first, *others = runs
    section.text.append(
        f"Each run against {first.label}. Ratios are of total times of the same arm on the prompts "
        "that both have; above 1 the other run is faster. Speed is compared twice: in tokens per "
        "second, which feels whatever else the machine did, and as speedup over the plain decoding "
        "of the same run."
    )
    for other in others:
        shown: list[Column] = []
        for key, title in (("tau", "tau"), ("speedup_vs_plain", "vs plain")):
            shown += [
                Column(f"{name}.{key}", f"{title}, {run.label}", 2)
                for name, run in (("first", first), ("other", other))
            ]
        rows = _pairs(first, other)
        modes = {run.label: run.data.provenance.compile_mode for run in (first, other)}
        eager = [label for label, mode in modes.items() if mode == "eager"]
        alarms = [
            f"{label} is compiled ({mode}), {eager[0]} is eager: ratios of tokens per second are "
            "not the gain of a drafter"
            for label, mode in modes.items()
            if eager and label not in eager
        ]
        caption = f"{other.label} against {first.label}"
        section.show(Table("pairs", caption, rows, shown, alarms=alarms))
        for run, another in ((first, other), (other, first)):
            alone = {arm.name for arm in run.data.arms} - {arm.name for arm in another.data.arms}
            if alone:
                said = ", ".join(sorted(alone))
                section.missing.append(f"Arms that only {run.label} has: {said}.")
        if not any(row["prompts"] for row in rows):
            section.missing.append(
                f"No ratios paired by prompt: {first.label} and {other.label} share no prompt with "
                "figures of its own."
            )


def _pairs(first: Run, other: Run) -> list[dict[str, Any]]:
    """Compare each arm that both have, on the prompts that it and plain decode in both."""
    (ours, our_work), (theirs, their_work) = (
        ({arm.name: arm for arm in run.data.arms}, _work_by_prompt(run)) for run in (first, other)
    )
    rows = []
    for name in ours:
        if name in theirs:
            works = [work[arm] for work in (our_work, their_work) for arm in (name, "plain")]
            shared = [mark for mark in works[0] if all(mark in each for each in works)]
            old, old_plain, new, new_plain = ([each[mark] for mark in shared] for each in works)
            row = {"arm": name, "first": ours[name], "other": theirs[name]}
            row |= {"prompts": len(shared) or None}
            row |= total_speed("decode_tokens_per_s", [new], [old])
            rows.append(row | total_speed("speedup_vs_plain", [new, old_plain], [new_plain, old]))
    return rows


def _work_by_prompt(run: Run) -> dict[str, dict[Any, Work]]:
    """Give every arm's decoding by prompt; one that is given twice is told apart by its turn."""
    marks = [prompt.fingerprint for prompt in run.data.prompts or ()]
    turns = [(mark, marks[:place].count(mark)) for place, mark in enumerate(marks)]
    return {
        arm.name: {
            turn: Work(figures.decode_tokens, figures.decode_s)
            for turn, figures in zip(turns, arm.per_prompt or (), strict=False)
            if figures is not None and figures.decode_s
        }
        for arm in run.data.arms
    }


def add_settings(section: Section, runs: Sequence[Run]) -> None:
    """Show provenance and settings: a column a run, a row a setting."""
    facts = [_facts(run) for run in runs]
    titles = [f"{run.label} ({run.kind})" for run in runs]
    rows = [
        {"name": name, **{title: each.get(name) for title, each in zip(titles, facts, strict=True)}}
        for name in dict.fromkeys(name for each in facts for name in each)
    ]
    shown = [Column(title, title) for title in titles]
    section.show(Table("settings", "Provenance and settings", rows, shown))
    dirty = [run.label for run in runs if run.data.provenance.git_dirty]
    if dirty:
        section.text.append(
            f"Run with changes that no commit holds: {', '.join(dirty)}. Nobody can repeat these "
            "figures exactly."
        )


def _facts(run: Run) -> dict[str, Any]:
    where, config, identity = run.provenance, run.config, run.identity or {}
    prompts, sampling = config.get("prompts"), config.get("sampling")
    marks = [f"{key} {identity[key][:8]}" for key in ("weights", "tokenizer") if identity.get(key)]
    name = identity.get("name") or (config.get("target") or {}).get("path")
    cpu = where.get("cpu") and f"{where['cpu']}, {where.get('cpu_count')} cores"
    commit, load = (where.get("git_commit") or "")[:12], where.get("load_average")
    keys = ("rule", "batch_size", "max_new_tokens", "repeats", "seed")
    return {
        "schema": run.data.schema_,
        "date": where.get("date"),
        "commit": _noted(commit, where.get("git_dirty") and "changed"),
        "command": where.get("command"),
        "target": _noted(name and last_part(name), ", ".join(marks)),
        "dtype": _noted(where.get("dtype"), where.get("quantized") and "quantized"),
        "device": _noted(where.get("device"), cpu),
        "threads": where.get("threads"),
        "OMP_WAIT_POLICY": where.get("omp_wait_policy"),
        "compile mode": _noted(where.get("compile_mode"), where.get("compiler")),
        "compilation, s": where.get("compile_s"),
        "load at the start": None if load is None else f"{load:.1f}",
        "prompts": prompts and f"{prompts['num']} of {last_part(prompts['source'])}",
        "sampling": sampling and _sampling(**sampling),
        **{key.replace("_", " "): config.get(key) for key in keys},
        **{f"arm {arm['name']}": _arm(**arm) for arm in config.get("arms") or ()},
        "versions": ", ".join(f"{k} {v}" for k, v in (where.get("versions") or {}).items()) or None,
    }


def _noted(text: str | None, note: str | None) -> str | None:
    """Add a note in parentheses, where there is one."""
    return f"{text} ({note})" if text and note else text or None


def _sampling(temperature: float = 0, **others: Any) -> str:
    """Give the temperature, and what is not off."""
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    said = (f"{key} {value}" for key, value in others.items() if value != off.get(key, 0))
    return ", ".join([f"T = {temperature:g}", *said])


def _arm(type: str, name: str, **options: Any) -> str:
    return ", ".join([type, *(f"{key} {value}" for key, value in options.items() if value)])
