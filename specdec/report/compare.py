"""Comparison of runs: everything but the drafters has to be the same."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.common.stats import Work, Works, total_speed
from specdec.report.document import Section
from specdec.report.runs import Run
from specdec.report.tables import Column, lookup

# Fields that `--allow` takes -> keys of a run that must agree; only what both know is compared.
MUST_AGREE = {
    "schema": ("schema",),
    "target": ("target",),
    "prompts": ("prompts",),
    "sampling": ("config.sampling",),
    "seed": ("seed",),
    "max_new_tokens": ("config.max_new_tokens",),
    "batch_size": ("config.batch_size", "config.prompts_per_call"),
    "rule": ("config.rule",),
    "dtype": ("dtype", "quantized", "config.target.quantization"),
    "device": ("device", "cpu", "cpu_count"),
    "threads": ("threads",),
    "processes": ("processes",),
}
# An analysis depends on no machine; a plan is of one target on one machine.
_ANALYSIS_FIELDS = ("target", "prompts", "sampling", "seed", "max_new_tokens", "dtype")
PLAN_FIELDS = ("target", "sampling", "rule", "dtype", "device", "threads")


@dataclass(frozen=True)
class Difference:
    """A setting that two runs know and that differs; `field` is what `--allow` takes."""

    field: str
    key: str
    first: Any
    other: Any


def find_differences(
    first: Run, other: Run, fields: Collection[str] = tuple(MUST_AGREE)
) -> list[Difference]:
    """Find differences that make figures of two runs incomparable."""
    ours, theirs = _settings(first), _settings(other)
    return [
        Difference(field, *each)
        for field in fields
        for key in MUST_AGREE[field]
        for each in _differing(key.removeprefix("config."), lookup(ours, key), lookup(theirs, key))
    ]


def _settings(run: Run) -> dict[str, Any]:
    """Collect what may have to agree."""
    config = run.config
    temperature = lookup(config, "sampling.temperature")
    target, prompts = {"path": lookup(config, "target.path")}, config.get("prompts")
    if run.identity is not None:  # it tells the model itself, wherever it was loaded from
        keys = ["weights", "tokenizer", "hidden_size", "vocab_size", "num_layers"]
        if None in (run.identity.get("weights"), run.identity.get("tokenizer")):
            keys.append("name")
        target = {key: run.identity.get(key) for key in keys}
        facts = run.identity.get("facts") or {}
        target |= {key: value for key, value in facts.items() if key != "quantization"}
    if getattr(run.data, "prompts", None):
        marks = " ".join(sorted(each.fingerprint for each in run.data.prompts))
        short = hashlib.sha256(marks.encode()).hexdigest()[:12]
        prompts = f"{len(run.data.prompts)} prompts with the fingerprint {short}"
    return {
        **run.provenance,
        "schema": run.data.schema_,
        "target": target,
        "prompts": prompts,
        "seed": config.get("seed") if temperature else None,  # nothing is drawn at 0
    }


def _differing(key: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Give key and both values where both are known and differ, of mappings for each key."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return [
            each
            for name, value in ours.items()
            for each in _differing(f"{key}.{name}", value, theirs.get(name))
        ]
    return [] if None in (ours, theirs) or ours == theirs else [(key, ours, theirs)]


def check_comparable(
    runs: Sequence[Run], allowed: Sequence[str] = ()
) -> dict[str, list[Difference]]:
    """Refuse benches that differ from the first; gives the allowed differences by label."""
    unknown = [field for field in allowed if field not in MUST_AGREE]
    if unknown:
        raise ValueError(f"--allow is {unknown[0]!r} but must be one of {', '.join(MUST_AGREE)}")
    found = {other.label: find_differences(runs[0], other) for other in runs[1:]}
    for label, differences in found.items():
        refused = [each for each in differences if each.field not in allowed]
        if refused:
            said = "; ".join(
                f"{each.key} is {str(each.first)!r} in {runs[0].label!r} and "
                f"{str(each.other)!r} in {label!r}"
                for each in refused
            )
            fields = list(dict.fromkeys(each.field for each in refused))
            raise ValueError(
                f"runs that are not comparable: {said}. Run both with the same "
                f"{', '.join(fields)}, or pass {' '.join(f'--allow {field}' for field in fields)}"
            )
    return found


def warn_of_differences(runs: Sequence[Run]) -> list[str]:
    """Say which analyses, sweeps or suites a reader must not compare."""
    found = []
    firsts: dict[tuple[str, str], Run] = {}
    for run in runs:
        if run.kind in ("analysis", "sweep", "suite"):
            first = firsts.setdefault((run.kind, getattr(run.data, "suite", "")), run)
            fields = _ANALYSIS_FIELDS if run.kind == "analysis" else tuple(MUST_AGREE)
            differences = find_differences(first, run, fields)
            said = "; ".join(f"{each.key} is {each.first} and {each.other}" for each in differences)
            if said:
                found.append(f"Do not compare {first.label} with {run.label}: {said}.")
    return found


def add_comparison(section: Section, runs: Sequence[Run]) -> None:
    """Set every bench against the first."""
    first, *others = runs
    section.text.append(
        f"Each run against {first.label}. Ratios are of total times of the same arm on the prompts "
        "that both have; above 1 the other run is faster. Speed is compared twice: in tokens per "
        "second, which feels whatever else the machine did, and as speedup over the plain decoding "
        "of the same run."
    )
    for other in others:
        rows = _pairs(first, other)
        columns = [
            Column("arm", "arm"),
            Column("first.tau", f"tau, {first.label}", 2),
            Column("other.tau", f"tau, {other.label}", 2),
            Column("first.speedup_vs_plain", f"vs plain, {first.label}", 2),
            Column("other.speedup_vs_plain", f"vs plain, {other.label}", 2),
            Column("prompts", "prompts paired", 0),
            Column("decode_tokens_per_s", "tokens/s, ratio", 3),
            Column("speedup_vs_plain", "vs plain, ratio", 3),
        ]
        section.tabulate("pairs", f"{other.label} against {first.label}", columns, rows)
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
    theirs = {arm.name: arm for arm in other.data.arms}
    rows = []
    for arm in first.data.arms:
        if arm.name in theirs:
            old, old_plain, new, new_plain = _paired_works((first, other), (arm.name, "plain"))
            rows.append(
                {
                    "arm": arm.name,
                    "first": arm,
                    "other": theirs[arm.name],
                    "prompts": len(old) or None,
                    **total_speed("decode_tokens_per_s", [new], [old]),
                    **total_speed("speedup_vs_plain", [new, old_plain], [new_plain, old]),
                }
            )
    return rows


def _paired_works(runs: Sequence[Run], arms: Sequence[str]) -> list[Works]:
    """Give the decoding of each arm in each run, on the prompts that all of them have decoded."""
    found = [_work_by_prompt(run, arm) for run in runs for arm in arms]
    shared = [mark for mark in found[0] if all(mark in each for each in found)]
    return [[each[mark] for mark in shared] for each in found]


def _work_by_prompt(run: Run, name: str) -> dict[Any, Work]:
    """Give decoding by prompt; the same prompt given twice is told apart by its turn."""
    arm = next(arm for arm in run.data.arms if arm.name == name)
    found: dict[Any, Work] = {}
    seen: dict[str, int] = {}
    for prompt, figures in zip(run.data.prompts or (), arm.per_prompt or (), strict=False):
        mark = prompt.fingerprint
        seen[mark] = seen.get(mark, 0) + 1
        if figures is not None and figures.decode_s:
            found[mark, seen[mark]] = Work(figures.decode_tokens, figures.decode_s)
    return found
