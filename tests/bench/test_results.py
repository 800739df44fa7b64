"""Results files: the committed ones are read, and a damaged one is named by its key."""

import json
from pathlib import Path

import pytest

from specdec.bench.results import BenchResults, SuiteResults, SweepResults

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MODELS = {"bench": BenchResults, "suite": SuiteResults, "sweep": SweepResults}


def committed():
    for path in sorted(EXPERIMENTS.rglob("*.json")):
        content = json.loads(path.read_text())
        schema = content.get("schema", "") if isinstance(content, dict) else ""
        kind = schema.removeprefix("specdec-").rpartition("-")[0]
        if kind in MODELS:
            yield pytest.param(MODELS[kind], content, id=str(path.relative_to(EXPERIMENTS)))


@pytest.mark.parametrize(("model", "content"), list(committed()))
def test_committed_file_is_read(model, content):
    results = model.read(content)
    # Fields that came later have no value there.
    assert results.model_dump(mode="json", by_alias=True, exclude_unset=True) == content
    for part in getattr(results, "cells", None) or getattr(results, "groups", None) or [results]:
        assert part.arms[0].name == "plain"
        assert part.arms[0].mean_speedup_vs_plain == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["arms"][0].pop("tau"), "arms.0.tau: Field required; restore the file"),
        (lambda d: d["arms"][0].update(extra=1), "arms.0.extra: Extra inputs are not permitted"),
        (lambda d: d["arms"][1].update(tau_ci=[1.0]), "arms.1.tau_ci"),
        (lambda d: d["memory"].pop("peak_rss_bytes"), "memory.peak_rss_bytes: Field required"),
        (
            lambda d: d.update(schema="specdec-bench-2"),
            "schema: Input should be 'specdec-bench-3'; .* run it again",
        ),
    ],
)
def test_damaged_results_are_named_by_key(change, message):
    content = json.loads((EXPERIMENTS / "04-recipes/bench-qlora/results.json").read_text())
    change(content)
    with pytest.raises(ValueError, match=message):
        BenchResults.read(content)
