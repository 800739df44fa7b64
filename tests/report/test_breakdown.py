"""Where time and speedup went: parts add up, factors multiply to what was measured."""

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace

import made_runs
import pytest

from specdec.bench.results import BenchResults
from specdec.report.breakdown import OUTSIDE, Breakdown, break_down, count_steps, explain_speedup

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMITTED = sorted(
    path
    for path in EXPERIMENTS.rglob("results.json")
    if json.loads(path.read_text()).get("schema", "").startswith("specdec-bench-")
)


def test_waterfall_has_factors_computed_by_hand():
    plain = Breakdown("plain", 1.0, {"target": 3.0, "draft": 0.0, "other": 1.0})
    ours = Breakdown("ours", 4.0, {"target": 5.0, "draft": 2.0, "other": 2.0})
    fall = explain_speedup(SimpleNamespace(name="ours", speedup_vs_plain=2.0), ours, plain)
    assert fall.factors["target forward"] == pytest.approx(4 / 6)
    assert fall.factors["drafting"] == pytest.approx(6 / 8)
    assert fall.factors["rest of the loop"] == pytest.approx(8 / 9)
    # The steps make 4 tokens x 4 ms / 9 ms.
    assert fall.factors[OUTSIDE] == pytest.approx(2.0 / (16 / 9))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_factors_multiply_to_measured_speedup(path):
    results = BenchResults.read(json.loads(path.read_text()))
    config = results.provenance.config
    found = {arm.name: break_down(arm, config.repeats) for arm in results.arms}
    falls = [
        explain_speedup(arm, found[arm.name], found["plain"])
        for arm in results.arms
        if found[arm.name] is not None and arm.speedup_vs_plain is not None
    ]
    one_row = config.batch_size == 1
    assert bool(falls) == (one_row or results.prompts is not None)
    for fall in falls:
        assert fall.tau * prod(fall.factors.values()) == pytest.approx(fall.measured, rel=1e-12)
    # The speedup is the steps' own, but for one arm's slow repeat, which moves no median.
    away = sorted(abs(fall.factors[OUTSIDE] - 1) for fall in falls) if one_row else []
    assert all(each < 0.1 for each in away[:-1])
    assert all(each < 0.15 for each in away)


def test_parts_of_a_step_add_up_to_wall_time():
    for arm in BenchResults.read(made_runs.bench()).arms:
        found, steps = break_down(arm, 3), count_steps(arm, 3)
        if arm.name == "hf_generate":
            assert found is None
        else:
            assert sum(found.step_ms.values()) == pytest.approx(1000 * arm.time_s.wall / steps)
            total = sum(found.token_ms.values())
            assert total * found.tau == pytest.approx(sum(found.step_ms.values()))


def test_steps_of_old_runs_follow_from_tokens():
    content = made_runs.bench()
    repeats = content["provenance"]["config"]["repeats"]
    for arm in BenchResults.read(content).arms:
        if arm.tau is not None:
            old = arm.model_copy(update={"per_prompt": None})
            assert count_steps(old, repeats) == pytest.approx(count_steps(arm, repeats), rel=0.02)
