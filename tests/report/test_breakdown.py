"""Where time and speedup went: parts add up, factors multiply to what was measured."""

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace

import made_runs
import pytest

from specdec.bench.results import BenchResults
from specdec.report.bench import count_steps, speedup_factors, step_ms

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMITTED = sorted(
    path
    for path in EXPERIMENTS.rglob("results.json")
    if json.loads(path.read_text()).get("schema", "").startswith("specdec-bench-")
)


def test_waterfall_has_factors_computed_by_hand():
    plain = {"target": 3.0, "draft": 0.0, "other": 1.0}
    ours = {"target": 5.0, "draft": 2.0, "other": 2.0}
    arm = SimpleNamespace(tau=4.0, speedup_vs_plain=2.0)
    # The steps make 4 tokens x 4 ms / 9 ms.
    expected = {
        "target forward": 4 / 6,
        "drafting": 6 / 8,
        "rest of the loop": 8 / 9,
        "outside of steps": 2.0 / (16 / 9),
    }
    assert speedup_factors(arm, ours, plain) == pytest.approx(expected)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_factors_multiply_to_measured_speedup(path):
    results = BenchResults.read(json.loads(path.read_text()))
    config = results.provenance.config
    steps = {arm.name: step_ms(arm, config.repeats) for arm in results.arms}
    outside = []
    for arm in results.arms:
        if steps[arm.name] and arm.speedup_vs_plain is not None:
            factors = speedup_factors(arm, steps[arm.name], steps["plain"])
            whole = arm.tau * prod(factors.values())
            assert whole == pytest.approx(arm.speedup_vs_plain, rel=1e-12)
            outside.append(abs(factors["outside of steps"] - 1))
    one_row = config.batch_size == 1
    assert bool(outside) == (one_row or results.prompts is not None)
    # The speedup is the steps' own, but for one arm's slow repeat, which moves no median.
    away = sorted(outside) if one_row else []
    assert all(each < 0.1 for each in away[:-1])
    assert all(each < 0.15 for each in away)


def test_parts_of_a_step_add_up_to_wall_time():
    for arm in BenchResults.read(made_runs.bench()).arms:
        parts = step_ms(arm, 3)
        if arm.name == "hf_generate":
            assert not parts
        else:
            wall = 1000 * arm.time_s.wall / count_steps(arm, 3)
            assert sum(parts.values()) == pytest.approx(wall)


def test_steps_without_figures_by_prompt_follow_from_tokens():
    content = made_runs.bench()
    repeats = content["provenance"]["config"]["repeats"]
    for arm in BenchResults.read(content).arms:
        if arm.tau is not None:
            old = arm.model_copy(update={"per_prompt": None})
            assert count_steps(old, repeats) == pytest.approx(count_steps(arm, repeats), rel=0.02)
