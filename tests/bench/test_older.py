"""Results files of earlier versions: the committed ones are read, and get today's headline."""

import copy
import json
from pathlib import Path

import pytest

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.results import BenchResults, SuiteResults, SweepResults
from specdec.bench.store import Call, Peaks, Run
from specdec.bench.summary import bench_arms
from specdec.bench.workloads import Group, Request
from specdec.engine.metrics import StepRecord

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MODELS = {"bench": BenchResults, "suite": SuiteResults, "sweep": SweepResults}
SPEEDS = ("decode_tokens_per_s", "speedup_vs_plain", "speedup_vs_hf")
REPEATS, TOKENS = 3, 7


def committed():
    for path in sorted(EXPERIMENTS.rglob("*.json")):
        content = json.loads(path.read_text())
        schema = content.get("schema", "") if isinstance(content, dict) else ""
        kind = schema.removeprefix("specdec-").rpartition("-")[0]
        if kind in MODELS:
            yield pytest.param(MODELS[kind], path, id=str(path.relative_to(EXPERIMENTS)))


@pytest.mark.parametrize(("model", "path"), list(committed()))
def test_committed_file_is_read(model, path):
    results = model.read(json.loads(path.read_text()))
    cells = results.cells if model is SweepResults else []
    parts = [(cell.name, cell.arms) for cell in cells] if cells else results.parts
    for _, arms in parts:
        assert arms[0].name == "plain"
        assert arms[0].mean_speedup_vs_plain == 1.0


def run(ms, place, repeat):
    """Seven tokens at about this speed; the first prompt is slow in its last repeat."""
    step_s = ms / 1000 * (1 + 0.1 * place) * (1.5 if (place, repeat) == (0, 2) else 1)
    steps = range(TOKENS - 1)
    records = [StepRecord(0, i, 1, 0, 0, 0, 1, 0.0, step_s, step_s) for i in steps]
    return Run([5] * TOKENS, 1, 0.01, step_s * (TOKENS - 1), records)


@pytest.fixture
def today():
    """The content of a results.json of four prompts."""
    config = BenchConfig(arms=[ArmConfig(type="ngram", options={"min_ngram": 2})], repeats=REPEATS)
    group = Group(
        "prompts", 4, [[Request(str(i), "ab"[i % 2], [i + 1], TOKENS, i)] for i in range(4)]
    )
    calls = {
        name: [
            [
                Call([one := run(ms, place, repeat)], one.ttft_s + one.decode_s, Peaks(9, None, 4))
                for repeat in range(REPEATS)
            ]
            for place in range(4)
        ]
        for name, ms in {"plain": 4.0, "hf_generate": 5.0, "ngram": 2.0}.items()
    }
    arms = bench_arms(config, group, calls, {name: [] for name in calls}, [])
    where = {
        **{"command": "x", "git_commit": None, "git_dirty": False, "versions": {}, "date": ""},
        **{"device": "cpu", "cpu": "", "cpu_count": 1, "threads": 1, "load_average": 0.0},
        **{"dtype": "float32", "quantized": False, "config_fingerprint": ""},
    }
    prompts = [
        {"id": r.id, "domain": r.domain, "num_tokens": 1, "fingerprint": r.fingerprint}
        for r in group.requests
    ]
    results = BenchResults(
        provenance={**where, "config": config.model_dump()},
        memory={"peak_rss_bytes": 9, "peak_device_bytes": None, "cache_bytes": 4},
        prompts=prompts,
        arms=arms,
    )
    return json.loads(results.model_dump_json(by_alias=True))


def second_version(today):
    """As version 2 wrote it: means under the headline's name, and prompts without seconds."""
    old = copy.deepcopy(today) | {"schema": "specdec-bench-2"}
    for arm in old["arms"]:
        arm["speedup_vs_plain"] = arm.pop("mean_speedup_vs_plain")
        for figures in (arm, *arm["domains"].values()):
            for key in (SPEEDS[0], SPEEDS[2]):
                figures[key] = figures[f"{key}_ci"] = None
        for each in arm["per_prompt"]:
            del each["decode_s"], each["decode_tokens"]
    return old


def first_version(today):
    old = second_version(today) | {"schema": "specdec-bench-1"}
    del old["prompts"]
    for arm in old["arms"]:
        for key in ("per_prompt", "domains", "finish", "type", "options", "draft_length"):
            del arm[key]
        del arm["time_s"]["verify"], arm["time_s"]["commit"]
    return old


def same(found, wanted, with_interval):
    for key in SPEEDS:
        near = 1e-9 if with_interval else 0.1
        assert getattr(found, key) == pytest.approx(getattr(wanted, key), rel=near)
        interval = getattr(wanted, f"{key}_ci") if with_interval else None
        assert getattr(found, f"{key}_ci") == (interval and pytest.approx(interval))


def test_second_version_gets_today_s_figures(today):
    wanted = BenchResults.read(copy.deepcopy(today))
    assert json.loads(wanted.model_dump_json(by_alias=True)) == today
    found = BenchResults.read(second_version(today))
    for old, new in zip(found.arms, wanted.arms, strict=True):
        same(old, new, with_interval=True)
        assert old.mean_speedup_vs_plain == new.mean_speedup_vs_plain
        for name, figures in new.domains.items():
            same(old.domains[name], figures, with_interval=True)
        seconds = [each.decode_s for each in new.per_prompt]
        assert [each.decode_s for each in old.per_prompt] == pytest.approx(seconds)


def test_first_version_gets_its_ratio_without_an_interval(today):
    wanted = BenchResults.read(copy.deepcopy(today))
    found = BenchResults.read(first_version(today))
    for old, new in zip(found.arms, wanted.arms, strict=True):
        same(old, new, with_interval=False)
        assert (old.type, old.options) == (new.type, new.options)
        assert old.per_prompt is old.finish is old.time_s.verify is None
    batched = first_version(today)
    batched["provenance"]["config"]["batch_size"] = 4  # no row's seconds are its own
    arms = BenchResults.read(batched).arms
    assert {arm.speedup_vs_plain for arm in arms} == {None}
    assert None not in {arm.mean_speedup_vs_plain for arm in arms}


def test_old_sweep_knows_its_repeats_by_tokens(today):
    old = second_version(today)
    arm = old["arms"][2]
    arm["per_prompt"][0]["tokens"] -= TOKENS
    arm["per_prompt"][1] = None
    arm["failures"] = [{"prompt": 0, "repeat": 2, "reason": "no"}]
    arm["failures"] += [{"prompt": 1, "repeat": repeat, "reason": "no"} for repeat in range(3)]
    arm["failed"] = 2
    where = {key: old["provenance"][key] for key in ("command", "git_commit", "git_dirty")}
    cell = {"name": "a", "settings": {}, "folder": "b", "error": None, "arms": old["arms"]}
    sweep = {
        "schema": "specdec-sweep-1",
        "provenance": {**where, "versions": {}, "date": "", "processes": 1},
        "cells": [cell],
    }
    found = SweepResults.read(sweep).cells[0].arms[2]
    tokens = [each and each.decode_tokens for each in found.per_prompt]
    assert tokens == [TOKENS - 1, None, TOKENS - 1, TOKENS - 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["arms"][0].pop("tau"), "arms.0.tau: Field required; restore the file"),
        (lambda d: d["arms"][0].update(extra=1), "arms.0.extra: Extra inputs are not permitted"),
        (lambda d: d["arms"][1].update(tau_ci=[1.0]), "arms.1.tau_ci"),
        (lambda d: d["memory"].pop("peak_rss_bytes"), "memory.peak_rss_bytes: Field required"),
        (lambda d: d.update(schema="specdec-bench-9"), "schema: Input should be 'specdec-bench-1'"),
    ],
)
def test_damaged_results_are_named_by_key(today, change, message):
    change(today)
    with pytest.raises(ValueError, match=message):
        BenchResults.read(today)
