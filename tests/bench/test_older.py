"""Results files of earlier versions: the committed ones are read, and get today's headline."""

import copy
import json
from pathlib import Path

import pytest
from tiny_models import tiny_target

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.results import BenchResults, SuiteResults, SweepResults
from specdec.bench.runner import run_bench
from specdec.bench.workloads import Group, Request

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MODELS = {"bench": BenchResults, "suite": SuiteResults, "sweep": SweepResults}
SPEEDS = ("decode_tokens_per_s", "speedup_vs_plain", "speedup_vs_hf")
TOKENS = 7


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


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of four prompts of two domains."""
    group = Group(
        "prompts", 4, [[Request(str(i), "ab"[i % 2], [i + 1, 7], TOKENS, i)] for i in range(4)]
    )
    config = BenchConfig(arms=[ArmConfig(type="ngram", options={"min_ngram": 1})], threads=1)
    folder = tmp_path_factory.mktemp("bench")
    return run_bench(config, folder, target=tiny_target(), groups=[group])


@pytest.fixture
def today(measured):
    """The content of their file."""
    return json.loads(measured.model_dump_json(by_alias=True))


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


def same(found, wanted):
    for key in SPEEDS:
        assert getattr(found, key) == pytest.approx(getattr(wanted, key))
        assert getattr(found, f"{key}_ci") == pytest.approx(getattr(wanted, f"{key}_ci"))


def test_second_version_gets_today_s_figures(measured, today):
    assert BenchResults.read(copy.deepcopy(today)) == measured
    found = BenchResults.read(second_version(today))
    for old, new in zip(found.arms, measured.arms, strict=True):
        same(old, new)
        assert old.mean_speedup_vs_plain == new.mean_speedup_vs_plain
        for name, figures in new.domains.items():
            same(old.domains[name], figures)
        seconds = [each.decode_s for each in new.per_prompt]
        assert [each.decode_s for each in old.per_prompt] == pytest.approx(seconds)


def test_first_version_gets_its_ratio_without_an_interval(measured, today):
    found, plain = BenchResults.read(first_version(today)), measured.arms[0]
    for old, new in zip(found.arms, measured.arms, strict=True):
        ratio = new.batch_decode_tokens_per_s / plain.batch_decode_tokens_per_s
        assert old.speedup_vs_plain == pytest.approx(ratio)
        assert (old.type, old.options) == (new.type, new.options)
        assert old.speedup_vs_plain_ci is old.per_prompt is old.finish is old.time_s.verify is None
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
