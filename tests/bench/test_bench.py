"""Benches: strict configuration, resuming, and figures that add up."""

import json
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from json_schema import violations
from tiny_models import perturbed, tiny_llama

from specdec.bench.config import load_config
from specdec.bench.provenance import collect
from specdec.bench.runner import run_bench

SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "target")
    save_checkpoint(folder / "draft", perturbed(tiny_llama(), 0.1))
    return folder


@pytest.fixture
def config(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello hello\nabcabcab\nx\n")
    (tmp_path / "bench.yaml").write_text(
        f"""
target: {{path: {models / "target"}}}
prompts: {{source: {tmp_path / "prompts.txt"}}}
max_new_tokens: 12
repeats: 2
threads: 1
arms:
  - {{type: ngram, options: {{min_ngram: 1}}}}
  - {{name: model, type: draft_model, options: {{path: {models / "draft"}}}}}
  - {{name: assisted, type: hf_assisted, options: {{path: {models / "draft"}}}}}
"""
    )
    return tmp_path / "bench.yaml"


def arm(results, name):
    return next(a for a in results["arms"] if a["name"] == name)


def test_a_bench_measures_every_arm_and_its_figures_add_up(config, tmp_path):
    results = run_bench(load_config(str(config)), tmp_path / "out")
    names = [a["name"] for a in results["arms"]]
    assert names == ["plain", "hf_generate", "ngram", "model", "assisted"]
    for a in results["arms"]:
        assert a["mismatches"] == a["failed"] == 0
        assert a["tokens"] == 3 * 12
        low, high = a["decode_tokens_per_s_ci"]
        assert low <= a["decode_tokens_per_s"] <= high
    assert arm(results, "plain")["tau"] == 1.0
    assert arm(results, "plain")["speedup_vs_plain"] == 1.0
    model = arm(results, "model")
    assert model["tau"] == pytest.approx(1 + sum(model["per_depth"]))
    assert model["tau"] > 1
    assert 0 < model["loop_efficiency"] <= 1
    assert results["memory"]["peak_rss_bytes"] > 100e6  # torch alone takes more
    # 2 layers x keys and values x 128 slots x 2 heads x 8 numbers x 4 bytes
    assert model["cache_bytes"] == results["memory"]["cache_bytes"] == 2 * 2 * 128 * 2 * 8 * 4
    assert arm(results, "hf_generate")["cache_bytes"] is None
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert violations(written, json.loads(SCHEMA.read_text())) == []
    assert written["arms"] == json.loads(json.dumps(results["arms"]))


def test_with_more_prompts_a_call_than_rows_the_batch_stays_full_and_no_token_changes(
    config, tmp_path
):
    (tmp_path / "prompts.txt").write_text("hello hello\nabcabcab\nx\nqrs\nsee the sea")
    options = ["arms=[{type: ngram}]", "repeats=1", "max_new_tokens=24"]
    alone = run_bench(load_config(str(config), options), tmp_path / "alone")
    settings = load_config(str(config), [*options, "batch_size=2", "prompts_per_call=5"])
    joined = run_bench(settings, tmp_path / "joined")
    rows = [json.loads(line) for line in (tmp_path / "joined/records.jsonl").open()]
    calls = {row["arm"]: row for row in rows if row["kind"] == "call"}
    assert len([row for row in rows if row["kind"] == "call"]) == 3
    steps = [row for row in rows if row["kind"] == "step" and row["arm"] == "plain"]
    # Five rows, two at a time: only the last ones of the fifth decode alone.
    assert sum(row["batch_size"] == 2 for row in steps) == 4 * 23
    assert arm(joined, "plain")["cache_bytes"] == 2 * arm(alone, "plain")["cache_bytes"]
    for a in joined["arms"]:
        call = calls[a["name"]]
        assert a["mismatches"] == 0
        assert a["tokens"] == arm(alone, a["name"])["tokens"] == 5 * 24
        assert a["batch_tokens_per_s"] == pytest.approx(5 * 24 / call["wall_s"])
        assert a["batch_decode_tokens_per_s"] > a["batch_tokens_per_s"] * 23 / 24
        assert call["wall_s"] > max(row["ttft_s"] + row["decode_s"] for row in call["rows"])


def test_provenance_is_of_the_start_of_a_run_not_of_its_end(config, tmp_path, monkeypatch):
    events = []

    def note(*arguments):
        events.append("provenance")
        return collect(*arguments)

    monkeypatch.setattr("specdec.bench.runner.collect", note)
    settings = load_config(str(config), ["arms=[]", "repeats=1"])
    run_bench(settings, tmp_path / "out", lambda done, total, text: events.append(text))
    assert events[0] == "provenance"
    assert events.count("provenance") == 1


def test_the_schema_describes_every_key_and_refuses_others(config, tmp_path):
    results = json.loads(
        json.dumps(run_bench(load_config(str(config), ["arms=[]"]), tmp_path / "out"))
    )
    schema = json.loads(SCHEMA.read_text())
    assert violations(results, schema) == []
    results["arms"][0]["extra"] = 1
    results["arms"][1]["tau_ci"] = [1.0]
    del results["memory"]["peak_rss_bytes"]
    assert violations(results, schema) == [
        "$.memory.peak_rss_bytes is missing",
        "$.arms[0].extra is not described",
        "$.arms[1].tau_ci is shorter than 2: [1.0]",
    ]


def test_a_killed_run_resumes_and_keeps_what_it_had(config, tmp_path, monkeypatch):
    settings, folder = load_config(str(config)), tmp_path / "out"

    def kill(done, total, text):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(settings, folder, kill)
    records = folder / "records.jsonl"
    before = records.read_text()
    records.write_text(before + '{"kind": "step", "half a li')
    run_bench(settings, folder)
    after = records.read_text()
    assert after.startswith(before)
    batches = [json.loads(line) for line in after.splitlines()]
    keys = [(b["repeat"], b["call"], b["arm"]) for b in batches if b["kind"] == "call"]
    assert len(keys) == len(set(keys)) == 2 * 3 * 5
    finished = json.loads((folder / "results.json").read_text())
    again = json.loads(json.dumps(run_bench(settings, folder)["arms"]))
    assert again == finished["arms"]


def test_a_folder_of_another_configuration_or_of_other_prompts_is_refused(config, tmp_path):
    folder = tmp_path / "out"
    once = load_config(str(config), ["arms=[]", "repeats=1"])
    run_bench(once, folder)
    with pytest.raises(ValueError, match="another configuration"):
        run_bench(load_config(str(config), ["arms=[]", "repeats=2"]), folder)
    (tmp_path / "prompts.txt").write_text("hello hello\nabcabcab\ny\n")
    with pytest.raises(ValueError, match="or of other prompts"):
        run_bench(once, folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_new_token=3", "did you mean max_new_tokens"),
        ("prompts.nun=3", "did you mean prompts.num"),
        ("repeats=0", "repeats is 0"),
        ("repeats=many", "many"),
        ("arms=[{type: ngram}, {type: ngram}]", "used twice"),
        ("arms={type: ngram}", "'arms' does not exist, or is of another kind"),
        ("arms=[ngram]", "arms.0 is 'ngram' but must be a mapping"),
        ("arms=[{type: ngram, options: [3]}]", "options is .* must be a mapping"),
        ("sampling.top_p=0", "sampling.top_p is 0.0 but must be in"),
        ("prompts_per_call=-1", "prompts_per_call is -1 but must be 0 or at least batch_size, 1"),
        ("sampling.min_new_tokens=13", "at most max_new_tokens, 12"),
        ("batch_size=2", "'assisted' .* one prompt at a time, but batch_size is 2"),
    ],
)
def test_a_wrong_configuration_is_named(config, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(str(config), [override])
