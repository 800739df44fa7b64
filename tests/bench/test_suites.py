"""Suites end to end: the same requests for every arm, and what fails a run."""

import json

import pytest
from tiny_suites import calls_of, key_of, save_suite
from typer.testing import CliRunner

from specdec.bench import arms
from specdec.bench.config import load_cells
from specdec.bench.measure import serve
from specdec.bench.results import SuiteResults
from specdec.bench.runner import check_results, run_bench
from specdec.cli import app
from specdec.engine.engine import Engine

KEYS = {
    "single_turn": "buckets: [{name: short, high: 30, num: 2}, {low: 60, high: 90, num: 2}]",
    "multi_turn": "turns: 3\nconversations: 2\n",
    "long_context": "bins: 3\nnum: 2\n",
    "concurrent": """
users: [1, 3]
requests_per_user: 2
prompt_len: {low: 5, high: 40}
answer_len: {low: 2, high: 8}
max_rows: 2
""",
}
NAMES = ["plain", "ngram", "model"]
# 2 layers x keys and values x 128 slots x 2 heads x 8 numbers x 4 bytes
ROW = 2 * 2 * 128 * 2 * 8 * 4


@pytest.fixture
def run(models, tmp_path):
    def run_suite(name, *overrides, out="out"):
        (cell,) = load_cells(save_suite(tmp_path, models, name, KEYS[name]), overrides)
        return run_bench(cell.config, tmp_path / out)

    return run_suite


@pytest.mark.parametrize("name", list(KEYS))
def test_arms_answer_alike_and_figures_add_up(run, tmp_path, name):
    results = run(name)
    check_results(results)
    assert SuiteResults.read(json.loads((tmp_path / "out/suite.json").read_text())) == results
    num_calls = 0
    for group in results.groups:
        assert [arm.name for arm in group.arms] == NAMES
        for arm in group.arms:
            assert arm.requests == len(group.requests)
            assert arm.failed == arm.mismatches == 0
            assert arm.tokens == sum(request.max_new_tokens for request in group.requests)
            assert arm.tau == pytest.approx(1 + sum(arm.per_depth))
            assert set(arm.ttft_s) == {"p50", "p95", "p99"}
            assert arm.memory.peak_rss_bytes > 100e6
            assert arm.memory.cache_bytes > 0
            assert set(arm.power.model_dump(exclude={"cpu_cores"}).values()) == {None}
            assert arm.power.cpu_cores > 0
            assert (arm.load is None) == (name != "concurrent")
        plain, _, model = group.arms
        assert plain.tau == plain.speedup_vs_plain == 1.0
        assert model.tau > 1
        num_calls += len(group.requests) if name != "concurrent" else 1
    keys = [key_of(row) for row in calls_of(tmp_path / "out")]
    assert sorted(keys) == sorted(
        (r, c, n) for r in range(2) for c in range(num_calls) for n in NAMES
    )
    # Arms take turns: none is first everywhere.
    assert {arm for (_, _, arm) in keys[:: len(NAMES)]} == set(NAMES)


def test_users_share_a_batch_and_wait_for_a_row(run, tmp_path):
    results = run("concurrent", "repeats=1")
    alone, three = (group.arms for group in results.groups)
    assert (alone[0].load.users, three[0].load.users) == (1, 3)
    assert len(three[0].load.user_tokens_per_s) == 3
    assert alone[0].load.jain_index == alone[0].load.worst_over_mean == 1.0
    assert 0 < three[0].load.worst_over_mean <= three[0].load.jain_index <= 1
    rows = [row for call in calls_of(tmp_path / "out") for row in call["rows"]]
    assert {step["batch_size"] for row in rows for step in row["records"]} == {1, 2}
    assert three[0].queue_s["p99"] > alone[0].queue_s["p99"]
    # The largest caches of target and drafter.
    assert [arm.memory.cache_bytes for arm in alone] == [ROW, ROW, 2 * ROW]
    assert [arm.memory.cache_bytes for arm in three] == [2 * ROW, 2 * ROW, 4 * ROW]


def test_requests_wait_under_a_cache_limit(run):
    options = ["repeats=1", "users=[3]", "max_rows=8", "arms=[]"]
    free = run("concurrent", *options, out="free")
    tight = run("concurrent", *options, f"max_cache_bytes={2 * ROW}", out="tight")
    check_results(tight)
    wide, narrow = (each.groups[0].arms[0] for each in (free, tight))
    assert narrow.failed == 0
    assert narrow.tokens == wide.tokens
    assert narrow.memory.cache_bytes <= 2 * ROW < wide.memory.cache_bytes
    assert narrow.queue_s["p99"] > 0
    with pytest.raises(ValueError, match="cache"):
        run("concurrent", *options, "max_cache_bytes=1000", out="none")


def test_sampled_requests_use_their_own_seeds(run, tmp_path):
    overrides = ["sampling.temperature=1", "users=[3]"]
    results, again = (run("concurrent", *overrides, out=out) for out in ("out", "again"))
    check_results(results)
    assert {arm.mismatches for arm in results.groups[0].arms} == {None}
    tokens = [
        [[r["tokens"] for r in row["rows"]] for row in calls_of(tmp_path / out)]
        for out in ("out", "again")
    ]
    assert tokens[0] == tokens[1]
    assert [g.requests for g in again.groups] == [g.requests for g in results.groups]


def test_other_tokens_than_plain_fail_the_run(models, tmp_path, monkeypatch):
    def swap_a_token(engine, *given):
        rows = serve(engine, *given)
        if engine.drafter is not None:
            rows[0].tokens[2] = (rows[0].tokens[2] + 1) % 97
        return rows

    monkeypatch.setattr(arms, "serve", swap_a_token)
    path = save_suite(tmp_path, models, "single_turn", KEYS["single_turn"])
    done = CliRunner().invoke(app, ["bench", path, "repeats=1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "outputs differ at temperature 0 in float32 in short (1-30); requests by" in done.stderr
    results = SuiteResults.read(json.loads((tmp_path / "out/suite.json").read_text()))
    ngram = results.groups[0].arms[1]
    assert [(d.request, d.position) for d in ngram.differences] == [("short-0", 2), ("short-1", 2)]
    assert all(difference.top2_gap > 0 for difference in ngram.differences)
    with pytest.raises(RuntimeError, match="first: request short-0 from output token 2"):
        check_results(results)
    results.provenance.dtype = "bfloat16"
    check_results(results)  # there it is reported, and fails nothing


def test_arm_without_a_good_request_fails_the_run(run, monkeypatch):
    def break_one(engine, **options):
        if engine.drafter is not None and engine.num_running:
            raise RuntimeError("no luck")
        return real(engine, **options)

    real = Engine.advance
    monkeypatch.setattr(Engine, "advance", break_one)
    results = run("concurrent", "repeats=1", "users=[2]")
    plain, ngram, _ = results.groups[0].arms
    assert plain.failed == 0
    assert ngram.failed == ngram.requests == 4
    assert ngram.load.tokens_per_s is None
    with pytest.raises(RuntimeError, match="'ngram' in 2 users failed: RuntimeError: no luck"):
        check_results(results)
