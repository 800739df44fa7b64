"""Where time and speedup went: parts add up, factors multiply to what was measured."""

import json
from pathlib import Path

import made_runs
import pytest

from specdec.report.derived import Breakdown, breakdown, num_steps, waterfall
from specdec.report.runs import renew

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMITTED = sorted(
    path
    for path in EXPERIMENTS.rglob("results.json")
    if json.loads(path.read_text()).get("schema", "").startswith("specdec-bench-")
)


def test_a_waterfall_has_the_factors_that_a_hand_computes():
    plain = Breakdown("plain", 1.0, {"target": 3.0, "draft": 0.0, "other": 1.0})
    ours = Breakdown("ours", 4.0, {"target": 5.0, "draft": 2.0, "other": 2.0})
    fall = waterfall({"name": "ours", "speedup_vs_plain": 2.0}, ours, plain)
    factors = dict(fall.factors)
    assert factors["wider target forward"] == pytest.approx(4 / 6)
    assert factors["drafting"] == pytest.approx(6 / 8)
    assert factors["rest of the loop"] == pytest.approx(8 / 9)
    # The steps make 4 tokens x 4 ms / 9 ms.
    assert factors["outside of steps"] == pytest.approx(2.0 / (16 / 9))
    assert fall.product == pytest.approx(2.0)


def falls(results):
    repeats = results["provenance"]["config"]["repeats"]
    found = {arm["name"]: breakdown(arm, repeats) for arm in results["arms"]}
    arms = {arm["name"]: arm for arm in results["arms"]}
    return [
        waterfall(arms[name], each, found["plain"])
        for name, each in found.items()
        if each is not None and arms[name]["speedup_vs_plain"] is not None
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_factors_multiply_to_the_measured_speedup(batch_size):
    found = falls(made_runs.bench(batch_size=batch_size))
    assert [each.name for each in found] == ["plain", *made_runs.ARMS]
    for each in found:
        assert each.product == pytest.approx(each.measured, rel=1e-12)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_the_factors_multiply_in_every_committed_run(path):
    results = json.loads(path.read_text())
    renew(results)
    found = falls(results)
    one_row = results["provenance"]["config"]["batch_size"] == 1
    assert bool(found) == (one_row or results["schema"] != "specdec-bench-1")
    for each in found:
        assert each.product == pytest.approx(each.measured, rel=1e-12)
        # The speedup is the steps' own, but for little.
        assert dict(each.factors)["outside of steps"] == pytest.approx(1, abs=0.1 if one_row else 1)


def test_steps_of_an_old_run_are_derived_from_its_tokens_as_a_new_run_counts_them():
    for arm in made_runs.bench()["arms"]:
        if arm["tau"] is not None:
            old = {key: value for key, value in arm.items() if key != "per_prompt"}
            assert num_steps(old, repeats=3) == pytest.approx(num_steps(arm, repeats=3))


def test_the_parts_of_a_step_add_up_to_its_wall_time():
    results = made_runs.bench()
    for arm in results["arms"]:
        found = breakdown(arm, 3)
        if arm["name"] == "hf_generate":
            assert found is None
            continue
        steps = num_steps(arm, 3)
        assert sum(found.step_ms.values()) == pytest.approx(1000 * arm["time_s"]["wall"] / steps)
        assert sum(found.token_ms.values()) * found.tau == pytest.approx(
            sum(found.step_ms.values())
        )
