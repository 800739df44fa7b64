"""Results of earlier versions get the headline of today, as far as their records tell."""

import copy
import json

import made_runs
import pytest

from specdec.report.runs import renew

TODAY = json.loads(json.dumps(made_runs.bench()))
SPEEDS = ("decode_tokens_per_s", "speedup_vs_plain", "speedup_vs_hf")


def second_version():
    """As version 2 wrote it: means under the headline's name, and prompts without seconds."""
    old = copy.deepcopy(TODAY) | {"schema": "specdec-bench-2"}
    for arm in old["arms"]:
        arm["speedup_vs_plain"] = arm.pop("mean_speedup_vs_plain")
        for figures in (arm, *arm["domains"].values()):
            for key in SPEEDS[:1] + SPEEDS[2:]:
                figures[key] = figures[f"{key}_ci"] = None
        for each in arm["per_prompt"]:
            del each["decode_s"], each["decode_tokens"]
    return old


def first_version():
    old = second_version() | {"schema": "specdec-bench-1"}
    del old["prompts"]
    for arm in old["arms"]:
        del arm["per_prompt"], arm["domains"]
    return old


def same(found, wanted, with_interval):
    for key in SPEEDS:
        assert found[key] == pytest.approx(wanted[key], rel=1e-9 if with_interval else 0.03)
        assert found[f"{key}_ci"] == (pytest.approx(wanted[f"{key}_ci"]) if with_interval else None)


def test_the_second_version_gets_what_a_bench_writes_today():
    old = second_version()
    renew(old)
    for found, wanted in zip(old["arms"], TODAY["arms"], strict=True):
        same(found, wanted, with_interval=True)
        assert found["mean_speedup_vs_plain"] == wanted["mean_speedup_vs_plain"]
        for name, figures in wanted["domains"].items():
            same(found["domains"][name], figures, with_interval=True)
        seconds = [each["decode_s"] for each in wanted["per_prompt"]]
        assert [each["decode_s"] for each in found["per_prompt"]] == pytest.approx(seconds)


def test_the_first_version_gets_its_ratio_of_all_times_without_an_interval():
    old = first_version()
    renew(old)
    for found, wanted in zip(old["arms"], TODAY["arms"], strict=True):
        same(found, wanted, with_interval=False)
    old = first_version()
    old["provenance"]["config"]["batch_size"] = 4  # no row's seconds are its own
    renew(old)
    assert {arm["speedup_vs_plain"] for arm in old["arms"]} == {None}
    assert None not in {arm["mean_speedup_vs_plain"] for arm in old["arms"]}


def test_a_sweep_s_repeats_are_those_of_its_tokens_and_a_failed_one_is_left_out():
    old = second_version()
    cells = {"schema": "specdec-sweep-1", "cells": [{"arms": copy.deepcopy(old["arms"])}]}
    (arm,) = (a for a in cells["cells"][0]["arms"] if a["name"] == "eagle3 tree")
    arm["per_prompt"][0]["tokens"] -= made_runs.TOKENS
    arm |= {"failed": 1, "failures": [{"prompt": 0, "repeat": 2, "reason": "no"}]}
    arm["per_prompt"][1] = None
    arm["failures"] += [{"prompt": 1, "repeat": repeat, "reason": "no"} for repeat in range(3)]
    renew(cells)
    assert [each and each["decode_tokens"] for each in arm["per_prompt"]][:3] == [24, None, 24]
    wanted = {a["name"]: a for a in TODAY["arms"]}
    same(cells["cells"][0]["arms"][2], wanted["eagle3 chain"], with_interval=True)


def test_an_older_plan_is_ranked_by_total_time():
    plan = made_runs.plan(TODAY) | {"schema": "specdec-plan-1"}
    renew(plan)
    first = plan["configurations"][0]
    ratio = first["plain_step_ms"] / first["step_ms"]["wall"]
    assert first["predicted_speedup"] == pytest.approx(first["predicted_tau"] * ratio)
    ends = [end * ratio for end in first["predicted_tau_ci"]]
    assert first["predicted_speedup_ci"] == pytest.approx(ends)


def test_results_of_today_stay_as_they_are():
    content = copy.deepcopy(TODAY)
    renew(content)
    assert content == TODAY
