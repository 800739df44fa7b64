"""Suites end to end: the same requests for every arm, resuming, and what fails a run."""

import json
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from json_schema import violations
from tiny_models import perturbed, tiny_llama
from tiny_suites import save_models, save_suite
from typer.testing import CliRunner

from specdec.bench import measure as calls
from specdec.bench.runner import GreedyMismatchError
from specdec.bench.suites import runner
from specdec.bench.suites.runner import check_suite, run_suite
from specdec.cli import app
from specdec.common.provenance import machine
from specdec.engine.engine import Engine

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "suites.schema.json").read_text())
KEYS = {
    "single_turn": """
buckets:
  - {name: short, low: 1, high: 30, num: 2}
  - {low: 60, high: 90, num: 2}
""",
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def suite(models, tmp_path):
    return lambda name: save_suite(tmp_path, models, name, KEYS[name])


def lines_of(folder):
    rows = [json.loads(line) for line in (folder / "suite-records.jsonl").open()]
    return [row for row in rows if row["kind"] == "call"]


@pytest.mark.parametrize("name", list(KEYS))
def test_every_arm_answers_every_request_alike_and_the_figures_add_up(suite, tmp_path, name):
    results = run_suite(suite(name), [], tmp_path / "out")
    check_suite(results)
    assert violations(json.loads((tmp_path / "out/suite.json").read_text()), SCHEMA) == []
    num_calls = 0
    for group in results["groups"]:
        assert [arm["name"] for arm in group["arms"]] == NAMES
        for arm in group["arms"]:
            assert arm["requests"] == len(group["requests"])
            assert arm["failed"] == arm["mismatches"] == 0
            assert arm["tokens"] == sum(request["max_new_tokens"] for request in group["requests"])
            assert arm["tau"] == pytest.approx(1 + sum(arm["per_depth"]))
            assert set(arm["ttft_s"]) == {"p50", "p95", "p99"}
            assert arm["memory"]["peak_rss_bytes"] > 100e6
            assert arm["memory"]["cache_bytes"] > 0
            assert arm["power"] == {"energy_j": None, "power_w": None, "energy_j_per_token": None}
            assert (arm["load"] is None) == (name != "concurrent")
        plain, _, model = group["arms"]
        assert plain["tau"] == plain["speedup_vs_plain"] == 1.0
        assert model["tau"] > 1
        num_calls += len(group["requests"]) if name != "concurrent" else 1
    keys = [(row["repeat"], row["call"], row["arm"]) for row in lines_of(tmp_path / "out")]
    assert sorted(keys) == sorted(
        (r, c, n) for r in range(2) for c in range(num_calls) for n in NAMES
    )
    # Arms take turns: none is first everywhere.
    assert {arm for (_, _, arm) in keys[:: len(NAMES)]} == set(NAMES)


def test_users_share_a_batch_and_what_has_no_row_waits(suite, tmp_path):
    results = run_suite(suite("concurrent"), ["arms=[]", "repeats=1"], tmp_path / "out")
    alone, three = (group["arms"][0]["load"] for group in results["groups"])
    assert (alone["users"], three["users"]) == (1, 3)
    assert len(three["user_tokens_per_s"]) == 3
    assert alone["jain_index"] == alone["worst_over_mean"] == 1.0
    assert 0 < three["worst_over_mean"] <= three["jain_index"] <= 1
    sizes = {
        size
        for row in lines_of(tmp_path / "out")
        for r in row["rows"]
        for size in r["steps"]["batch_size"]
    }
    assert sizes == {1, 2}
    queues = [group["arms"][0]["queue_s"]["p99"] for group in results["groups"]]
    assert queues[1] > queues[0]


def test_the_largest_caches_of_target_and_drafter_are_told(suite, tmp_path):
    results = run_suite(suite("concurrent"), ["repeats=1"], tmp_path / "out")
    alone, three = (group["arms"] for group in results["groups"])
    # 2 layers x keys and values x 128 slots x 2 heads x 8 numbers x 4 bytes
    row = 2 * 2 * 128 * 2 * 8 * 4
    assert [arm["memory"]["cache_bytes"] for arm in alone] == [row, row, 2 * row]
    assert [arm["memory"]["cache_bytes"] for arm in three] == [2 * row, 2 * row, 4 * row]


def test_requests_that_can_never_fit_the_cache_are_bad_input(suite, tmp_path):
    with pytest.raises(ValueError, match="cache"):
        run_suite(suite("concurrent"), ["max_cache_bytes=1000"], tmp_path / "out")


def test_with_a_limit_on_the_cache_requests_wait_and_none_is_dropped(suite, tmp_path):
    options = ["repeats=1", "users=[3]", "max_rows=8", "arms=[]"]
    free = run_suite(suite("concurrent"), options, tmp_path / "free")
    row = 2 * 2 * 128 * 2 * 8 * 4
    options.append(f"max_cache_bytes={2 * row}")
    tight = run_suite(suite("concurrent"), options, tmp_path / "tight")
    check_suite(tight)
    wide, narrow = (each["groups"][0]["arms"][0] for each in (free, tight))
    assert narrow["failed"] == 0
    assert narrow["tokens"] == wide["tokens"]
    assert narrow["memory"]["cache_bytes"] <= 2 * row < wide["memory"]["cache_bytes"]
    assert narrow["queue_s"]["p99"] > 0


def test_sampled_outputs_are_drawn_with_the_requests_own_seeds_and_not_compared(suite, tmp_path):
    path = suite("concurrent")
    results = run_suite(path, ["sampling.temperature=1", "users=[3]"], tmp_path / "out")
    check_suite(results)
    assert {arm["mismatches"] for arm in results["groups"][0]["arms"]} == {None}
    again = run_suite(path, ["sampling.temperature=1", "users=[3]"], tmp_path / "again")
    tokens = [[r["tokens"] for r in row["rows"]] for row in lines_of(tmp_path / "out")]
    assert tokens == [[r["tokens"] for r in row["rows"]] for row in lines_of(tmp_path / "again")]
    assert [g["requests"] for g in again["groups"]] == [g["requests"] for g in results["groups"]]


def test_a_killed_suite_resumes_and_serves_only_what_is_missing(suite, tmp_path, monkeypatch):
    path, folder = suite("single_turn"), tmp_path / "out"

    def kill(done, total, text):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(path, [], folder, kill)
    records = folder / "suite-records.jsonl"
    before = records.read_text()
    assert before.count('"kind": "call"') == 5
    records.write_text(before + '{"kind": "call", "half a li')
    served = []
    real = runner.measure_call
    monkeypatch.setattr(runner, "measure_call", lambda *a: served.append(1) or real(*a))
    results = run_suite(path, [], folder)
    assert records.read_text().startswith(before)
    assert len(served) == 2 * 4 * 3 - 5
    keys = [(row["repeat"], row["call"], row["arm"]) for row in lines_of(folder)]
    assert len(keys) == len(set(keys)) == 2 * 4 * 3
    # Everything is there: nothing is served, and the figures from the records are the same.
    again = run_suite(path, [], folder)
    assert len(served) == 2 * 4 * 3 - 5
    assert json.loads(json.dumps(again["groups"])) == json.loads(json.dumps(results["groups"]))


def test_a_line_that_lacks_its_end_alone_is_served_again(suite, tmp_path):
    path, folder = suite("single_turn"), tmp_path / "out"

    def kill(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(path, ["arms=[]", "repeats=1"], folder, kill)
    records = folder / "suite-records.jsonl"
    records.write_bytes(records.read_bytes()[:-1])
    run_suite(path, ["arms=[]", "repeats=1"], folder)
    assert [row["call"] for row in lines_of(folder)] == [0, 1, 2, 3]


def test_a_folder_of_another_configuration_or_of_other_requests_is_refused(suite, tmp_path):
    path, folder = suite("single_turn"), tmp_path / "out"
    run_suite(path, ["arms=[]", "repeats=1"], folder)
    with pytest.raises(ValueError, match="another configuration"):
        run_suite(path, ["arms=[]", "repeats=2"], folder)
    pool = tmp_path / "pool.jsonl"
    pool.write_text(pool.read_text().replace("latte", "water"))
    with pytest.raises(ValueError, match="or of other prompts"):
        run_suite(path, ["arms=[]", "repeats=1"], folder)


@pytest.fixture
def changeable(tmp_path, monkeypatch):
    """A suite whose words stay while what they mean changes, and how to change it."""
    models, plan = save_models(tmp_path), tmp_path / "plan.json"
    plan.write_text(json.dumps({"controller": {"step_s": {"1": {"0": 0.01, "1": 0.02}}}}))
    options = f"options: {{path: {models / 'draft'}}}, draft_length: {{plan: {plan}}}"
    path = save_suite(tmp_path, models, "single_turn", KEYS["single_turn"])
    overrides = ["repeats=1", f"arms=[{{name: model, type: draft_model, {options}}}]"]

    def change(what):
        if what == "plan":
            plan.write_text(json.dumps({"controller": {"step_s": {"1": {"0": 0.01, "1": 0.03}}}}))
        elif what in ("weights", "checkpoint"):
            folder = models / ("target" if what == "weights" else "draft")
            save_checkpoint(folder, perturbed(tiny_llama(), 0.2))
        else:
            key, value = {"device": ("device", "A GPU"), "commit": ("git_commit", "2" * 40)}[what]
            monkeypatch.setattr(runner, "machine", lambda target: machine(target) | {key: value})

    return path, overrides, change


@pytest.mark.parametrize("what", ["device", "weights", "plan", "checkpoint"])
def test_a_suite_goes_on_only_with_what_it_began_with(what, changeable, tmp_path):
    (path, overrides, change), folder = changeable, tmp_path / "out"

    def kill(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(path, overrides, folder, kill)
    before = (folder / "suite-records.jsonl").read_bytes()
    change(what)
    with pytest.raises(ValueError, match=rf"another origin: .*{what}.* now; choose another --out"):
        run_suite(path, overrides, folder)
    assert (folder / "suite-records.jsonl").read_bytes() == before


def test_a_finished_suite_keeps_its_provenance_and_refuses_another_target(changeable, tmp_path):
    (path, overrides, change), folder = changeable, tmp_path / "out"
    measured = run_suite(path, overrides, folder)["provenance"]
    change("commit")
    assert run_suite(path, overrides, folder)["provenance"] == measured
    change("weights")
    with pytest.raises(ValueError, match="another origin: the target's weights"):
        run_suite(path, overrides, folder)


def test_an_arm_with_other_tokens_than_plain_fails_the_run_and_is_told_where(
    suite, tmp_path, monkeypatch
):
    real = calls.serve

    def swap_a_token(engine, asks, sampling, after_step=lambda: None):
        rows = real(engine, asks, sampling, after_step)
        if engine.drafter is not None:
            rows[0].tokens[2] = (rows[0].tokens[2] + 1) % 97
        return rows

    monkeypatch.setattr(calls, "serve", swap_a_token)
    path = suite("single_turn")
    done = CliRunner().invoke(app, ["bench", path, "repeats=1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "outputs differ from plain decoding at temperature 0 in float32" in done.stderr
    results = json.loads((tmp_path / "out/suite.json").read_text())
    ngram = results["groups"][0]["arms"][1]
    assert [(d["request"], d["position"]) for d in ngram["differences"]] == [
        ("short-0", 2),
        ("short-1", 2),
    ]
    assert all(difference["top2_gap"] > 0 for difference in ngram["differences"])
    with pytest.raises(GreedyMismatchError, match="'ngram', short"):
        check_suite(results)
    results["provenance"]["dtype"] = "bfloat16"
    check_suite(results)  # there it is reported, and fails nothing


def test_requests_that_fail_are_counted_and_an_arm_without_any_left_fails_the_run(
    suite, tmp_path, monkeypatch
):
    def break_one(engine, **options):
        if engine.drafter is not None and engine.num_running:
            raise RuntimeError("no luck")
        return real(engine, **options)

    real = Engine.advance
    monkeypatch.setattr(Engine, "advance", break_one)
    results = run_suite(suite("concurrent"), ["repeats=1", "users=[2]"], tmp_path / "out")
    plain, ngram, _ = results["groups"][0]["arms"]
    assert plain["failed"] == 0
    assert ngram["failed"] == ngram["requests"] == 4
    assert ngram["load"]["tokens_per_s"] is None
    assert violations(json.loads((tmp_path / "out/suite.json").read_text()), SCHEMA) == []
    with pytest.raises(RuntimeError, match="'ngram', 2 users, failed: RuntimeError: no luck"):
        check_suite(results)


def test_a_call_of_which_one_request_failed_has_no_throughput(suite, tmp_path, monkeypatch):
    real = calls.serve

    def fail_the_last(engine, asks, sampling, after_step):
        return [*real(engine, asks, sampling, after_step)[:-1], "no room"]

    path = suite("concurrent")
    monkeypatch.setattr(runner, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(calls, "serve", fail_the_last)
    results = run_suite(path, ["repeats=1", "users=[2]", "arms=[]"], tmp_path / "out")
    check_suite(results)
    (plain,) = results["groups"][0]["arms"]
    assert plain["failures"] == [{"request": "user1-1", "repeat": 0, "reason": "no room"}]
    assert plain["load"]["tokens_per_s"] is None
    assert plain["latency_s"]["p50"] > 0


def test_options_that_an_arm_does_not_have_are_bad_input(suite, tmp_path):
    path = suite("concurrent")
    with pytest.raises(ValueError, match="min_ngramm"):
        run_suite(path, ["arms=[{type: ngram, options: {min_ngramm: 1}}]"], tmp_path / "out")
