"""Benches: strict configuration, resuming, and figures that add up."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from json_schema import violations
from tiny_models import perturbed, tiny_llama

from specdec.bench.config import ArmConfig, BenchConfig, load_config
from specdec.bench.runner import collect, run_bench
from specdec.bench.store import Run
from specdec.bench.summary import summarise

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


def kill_after(num_calls, settings, folder):
    """Begin a run and end it there, as Ctrl-C would."""

    def kill(done, total, text):
        if done == num_calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(settings, folder, kill)


def test_a_killed_run_resumes_and_keeps_what_it_had(config, tmp_path, monkeypatch):
    settings, folder = load_config(str(config)), tmp_path / "out"

    kill_after(7, settings, folder)
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


def test_a_finished_run_keeps_the_provenance_of_its_measurement(config, tmp_path, monkeypatch):
    settings, folder = load_config(str(config), ["arms=[]", "repeats=1"]), tmp_path / "out"
    measured = run_bench(settings, folder)["provenance"]
    later = {"git_commit": "2" * 40, "date": "2100-01-01"}
    monkeypatch.setattr("specdec.bench.runner.collect", lambda *given: collect(*given) | later)
    assert run_bench(settings, folder)["provenance"] == measured


@pytest.fixture
def changeable(config, tmp_path, monkeypatch):
    """A configuration whose words stay while what they mean changes, and how to change it."""
    save_checkpoint(tmp_path / "target")
    save_checkpoint(tmp_path / "draft", perturbed(tiny_llama(), 0.1))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"controller": {"step_s": {"1": {"0": 0.01, "1": 0.02}}}}))
    options = f"options: {{path: {tmp_path / 'draft'}}}, draft_length: {{plan: {plan}}}"
    arms = f"arms=[{{type: draft_model, {options}}}]"
    settings = load_config(str(config), [f"target.path={tmp_path / 'target'}", arms, "repeats=1"])

    def change(what):
        if what == "device":
            other = {"device": "A GPU"}
            monkeypatch.setattr(
                "specdec.bench.runner.collect", lambda *given: collect(*given) | other
            )
        elif what == "plan":
            plan.write_text(json.dumps({"controller": {"step_s": {"1": {"0": 0.01, "1": 0.03}}}}))
        else:
            folder = tmp_path / ("target" if what == "weights" else "draft")
            save_checkpoint(folder, perturbed(tiny_llama(), 0.2))

    return settings, change


CHANGES = ("device", "weights", "plan", "checkpoint")


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_only_with_what_it_began_with(what, changeable, tmp_path):
    (settings, change), folder = changeable, tmp_path / "out"

    kill_after(3, settings, folder)
    before = (folder / "records.jsonl").read_text()
    change(what)
    with pytest.raises(ValueError, match=rf"another origin: .*{what}.* now; choose another --out"):
        run_bench(settings, folder)
    assert (folder / "records.jsonl").read_text() == before


def test_a_checkpoint_that_is_gone_is_not_another_one(changeable, tmp_path):
    settings, _ = changeable
    done = run_bench(settings, tmp_path / "out")
    shutil.rmtree(tmp_path / "draft")
    assert run_bench(settings, tmp_path / "out")["arms"] == json.loads(json.dumps(done["arms"]))


def test_a_checkpoint_that_is_gone_for_a_while_is_still_compared_when_it_is_back(
    changeable, tmp_path
):
    (settings, change), folder = changeable, tmp_path / "out"

    kill_after(3, settings, folder)
    shutil.rmtree(tmp_path / "draft")
    with pytest.raises(FileNotFoundError, match="draft"):
        run_bench(settings, folder)
    change("checkpoint")
    with pytest.raises(ValueError, match="another origin: the checkpoint"):
        run_bench(settings, folder)


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
        ("arms=[{type: ngram, draft_length: 4}]", "draft_length"),
        ("arms=[{type: ngram, draft_length: {}}]", "'ngram': .*needs an entry for batch size 1"),
        ("arms=[{type: ngram, draft_length: {1: 2, 0: 4}}]", "'ngram': batch size 0 must be"),
        ("arms=[{type: ngram, draft_length: {1: -1}}]", "nodes for batch size 1 is -1"),
        ("arms=[{type: ngram, draft_length: {plans: x}}]", "{plan: PATH}"),
        ("arms=[{type: hf_prompt_lookup, draft_length: {1: 2}}]", "takes no draft_length"),
        ("batch_size=2", "'assisted' .* one prompt at a time, but batch_size is 2"),
    ],
)
def test_a_wrong_configuration_is_named(config, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(str(config), [override])


def test_results_say_which_target_and_prompts_they_are_of(config, tmp_path):
    results = run_bench(load_config(str(config), ["arms=[]", "repeats=1"]), tmp_path / "out")
    assert results["schema"] == "specdec-bench-3"
    assert results["target"]["hidden_size"] == 32
    assert results["target"]["weights"]
    assert [p["num_tokens"] for p in results["prompts"]] == [11, 8, 1]
    marks = [p["fingerprint"] for p in results["prompts"]]
    (tmp_path / "prompts.txt").write_text("hello hello\nabcabcaa\nx\n")
    other = run_bench(load_config(str(config), ["arms=[]", "repeats=1"]), tmp_path / "other")
    changed = [p["fingerprint"] for p in other["prompts"]]
    assert [a == b for a, b in zip(marks, changed, strict=True)] == [True, False, True]


def test_figures_by_prompt_add_up_to_those_of_the_arm(config, tmp_path):
    results = run_bench(load_config(str(config)), tmp_path / "out")
    for a in results["arms"]:
        rows = a["per_prompt"]
        assert [row["tokens"] for row in rows] == [2 * 12] * 3
        assert a["finish"] == {"eos": 0, "length": 3}
        steps, accepted = (sum(row[key] for row in rows) for key in ("steps", "accepted"))
        if a["tau"] is None:
            assert steps == 0
        else:
            assert a["tau"] == pytest.approx(1 + accepted / steps)
            # Prefill gave the first token of each repeat, every step its own beside the accepted.
            assert accepted + steps == 2 * 3 * 11
        ratios = [row["speedup_vs_plain"] for row in rows]
        assert a["mean_speedup_vs_plain"] == pytest.approx(sum(ratios) / 3)
        speed, plain = (
            sum(row["decode_tokens"] for row in each) / sum(row["decode_s"] for row in each)
            for each in (rows, results["arms"][0]["per_prompt"])
        )
        assert a["decode_tokens_per_s"] == pytest.approx(speed)
        assert a["speedup_vs_plain"] == pytest.approx(speed / plain)
        times = a["time_s"]
        assert sum(times.values()) == pytest.approx(2 * times["wall"])


def test_every_repeat_begins_with_an_empty_memory(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("abcabcab\nabcabcab\n")
    run_bench(load_config(str(config), ["arms=[{type: suffix}]"]), tmp_path / "out")
    rows = map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
    steps = [row for row in rows if row["kind"] == "step" and row["arm"] == "suffix"]
    drafts = [
        [[r["num_drafted"] for r in steps if (r["repeat"], r["call"]) == (n, c)] for c in (0, 1)]
        for n in (0, 1)
    ]
    assert drafts[0] == drafts[1]
    # Within a repeat the second of two equal prompts is drafted from the first one's answer.
    assert len(drafts[0][1]) < len(drafts[0][0])


def test_domains_are_benches_of_their_own_prompts(config, tmp_path):
    lines = [
        {"id": f"{domain}-{i}", "domain": domain, "text": text}
        for i, (domain, text) in enumerate([("sea", "abab"), ("land", "qrs"), ("sea", "see see")])
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["arms=[{type: ngram, options: {min_ngram: 1}}]", f"prompts.source={path}"]
    both = arm(run_bench(load_config(str(config), options), tmp_path / "both"), "ngram")
    assert [*both["domains"]] == ["sea", "land"]
    assert [each["prompts"] for each in both["domains"].values()] == [2, 1]
    path.write_text(json.dumps(lines[1]) + "\n")
    land = arm(run_bench(load_config(str(config), options), tmp_path / "land"), "ngram")
    assert both["domains"]["land"]["tau"] == land["tau"] != both["tau"]
    assert both["domains"]["land"]["tau_ci"] is None
    low, high = both["domains"]["sea"]["speedup_vs_plain_ci"]
    assert low <= both["domains"]["sea"]["speedup_vs_plain"] <= high


def summary_of(runs, domains, eos=()):
    """The figures of an arm with these runs; the baselines have the same."""
    config = BenchConfig(arms=[ArmConfig("ngram", "ngram")])
    names = ("plain", "hf_generate", "ngram")
    tables = dict.fromkeys(names, runs)
    (_, _, found) = summarise(config, tables, {name: [] for name in names}, domains, eos)
    return found


def test_an_answer_that_ended_itself_is_told_from_one_that_was_cut():
    runs = [[Run([5, 7], 1, 0.1, 0.1)], [Run([5, 6], 1, 0.1, 0.1)], [None]]
    found = summary_of(runs, ["a"] * 3, [7])
    assert found["finish"] == {"eos": 1, "length": 1}
    assert [row and row["finish"] for row in found["per_prompt"]] == ["eos", "length", None]


def test_waits_are_percentiles_over_prompts_of_the_median_of_their_repeats():
    def run(ttft_s, decode_s):
        return Run([5, 6, 7], 1, ttft_s, decode_s)

    runs = [
        [run(1.0, 0.2), run(9.0, 0.2), run(2.0, 0.8)],
        [run(3.0, 0.4), None, run(5.0, 1.2)],
        [None, None, None],
    ]
    found = summary_of(runs, ["a"] * 3)
    # Medians: 2 and 4 s to the first token, 0.1 and 0.4 s a token; a failed run has no time.
    assert found["ttft_s"] == pytest.approx({"p50": 3.0, "p90": 3.8, "p99": 3.98})
    assert found["itl_s"] == pytest.approx({"p50": 0.25, "p90": 0.37, "p99": 0.397})
    assert summary_of([[None]], ["a"])["ttft_s"] == {}


def test_a_schedule_limits_what_an_arm_drafts_and_a_plan_controls_it(config, models, tmp_path):
    model = f"type: draft_model, options: {{path: {models / 'draft'}, num_draft_tokens: 4}}"
    plan = tmp_path / "plan.json"
    plan.write_text('{"controller": {"step_s": {"1": {"0": 1.0, "2": 9.0}}}}')
    arms = {
        "free": "",
        "two": ", draft_length: {1: 2}",
        "none": ", draft_length: {1: 0}",
        # A draft that is said to cost nine plain steps is hardly ever made.
        "planned": f", draft_length: {{plan: {plan}}}",
    }
    listed = ", ".join(f"{{name: {name}, {model}{more}}}" for name, more in arms.items())
    results = run_bench(load_config(str(config), [f"arms=[{listed}]"]), tmp_path / "out")
    assert len(arm(results, "free")["per_depth"]) == 4
    assert len(arm(results, "two")["per_depth"]) == 2
    assert arm(results, "two")["draft_length"] == {"1": 2}
    assert arm(results, "none")["per_depth"] == []
    assert arm(results, "none")["tau"] == 1.0
    drafted = {
        name: sum(row["drafted"] for row in arm(results, name)["per_prompt"]) for name in arms
    }
    assert drafted["planned"] < drafted["two"] < drafted["free"]
    assert violations(results, json.loads(SCHEMA.read_text())) == []


@pytest.mark.parametrize("content", [None, "{}", "[]", "text", '{"controller": {"step_s": 3}}'])
def test_a_plan_without_a_controller_is_named(config, tmp_path, content):
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    settings = load_config(str(config), [f"arms=[{{type: ngram, draft_length: {{plan: {plan}}}}}]"])
    with pytest.raises((ValueError, FileNotFoundError), match=r"draft_length.plan .*specdec plan"):
        run_bench(settings, tmp_path / "out")
