"""Benches end to end: figures that add up, resuming, and what a folder refuses."""

import json
import shutil
from functools import partial

import pytest
import torch
from checkpoints import save_checkpoint
from tiny_models import perturbed, tiny_llama
from tiny_suites import calls_of, key_of, killed, save_bench

from specdec.bench import arms, runner
from specdec.bench.config import load_config
from specdec.bench.results import BenchResults
from specdec.bench.runner import run_bench
from specdec.common.provenance import machine
from specdec.targets.load import load_target


@pytest.fixture
def config(models, tmp_path):
    def load(*overrides):
        return load_config(str(tmp_path / "bench.yaml"), overrides)

    drafter = f"options: {{path: {models / 'draft'}}}"
    keys = f"""
max_new_tokens: 12
repeats: 2
arms:
  - {{type: ngram, options: {{min_ngram: 1}}}}
  - {{name: model, type: draft_model, {drafter}}}
  - {{name: assisted, type: hf_assisted, {drafter}}}
"""
    save_bench(tmp_path, models, "hello hello\nabcabcab\nx\n", keys)
    return load


def arm(results, name):
    return next(a for a in results.arms if a.name == name)


def test_figures_add_up_and_are_read_back(config, tmp_path):
    results = run_bench(config(), tmp_path / "out")
    assert [a.name for a in results.arms] == ["plain", "hf_generate", "ngram", "model", "assisted"]
    for a in results.arms:
        assert a.mismatches == a.failed == 0
        assert a.tokens == 3 * 12
        low, high = a.decode_tokens_per_s_ci
        assert low <= a.decode_tokens_per_s <= high
        rows = a.per_prompt
        assert [row.tokens for row in rows] == [2 * 12] * 3
        assert a.finish.model_dump() == {"eos": 0, "length": 3}
        steps, accepted = sum(r.steps for r in rows), sum(r.accepted for r in rows)
        if a.tau is None:
            assert steps == 0
        else:
            assert a.tau == pytest.approx(1 + accepted / steps)
            # Prefill gave the first token of each repeat, every step its own beside the accepted.
            assert accepted + steps == 2 * 3 * 11
        assert a.mean_speedup_vs_plain == pytest.approx(sum(r.speedup_vs_plain for r in rows) / 3)
        speed, plain = (
            sum(r.decode_tokens for r in each) / sum(r.decode_s for r in each)
            for each in (rows, results.arms[0].per_prompt)
        )
        assert a.decode_tokens_per_s == pytest.approx(speed)
        assert a.speedup_vs_plain == pytest.approx(speed / plain)
        times = a.time_s.model_dump()
        assert sum(times.values()) == pytest.approx(2 * times["wall"])
    assert arm(results, "plain").tau == arm(results, "plain").speedup_vs_plain == 1.0
    model = arm(results, "model")
    assert model.tau == pytest.approx(1 + sum(model.per_depth))
    assert model.tau > 1
    assert 0 < model.loop_efficiency <= 1
    assert results.memory.peak_rss_bytes >= model.peak_rss_bytes > 100e6  # torch alone takes more
    assert model.power.cpu_cores > 0
    # 2 layers x keys and values x 128 slots x 2 heads x 8 numbers x 4 bytes, of both models
    assert model.cache_bytes == results.memory.cache_bytes == 2 * 2 * 2 * 128 * 2 * 8 * 4
    assert arm(results, "hf_generate").cache_bytes is None
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert BenchResults.read(written) == results
    assert results.target.hidden_size == 32
    assert results.target.weights
    assert [p.num_tokens for p in results.prompts] == [11, 8, 1]
    assert len({p.fingerprint for p in results.prompts}) == 3


def test_full_batch_changes_no_token(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello hello\nabcabcab\nx\nqrs\nsee the sea")
    options = ["arms=[{type: ngram}]", "repeats=1", "max_new_tokens=24"]
    alone = run_bench(config(*options), tmp_path / "alone")
    joined = run_bench(config(*options, "batch_size=2", "prompts_per_call=5"), tmp_path / "joined")
    calls = {row["arm"]: row for row in calls_of(tmp_path / "joined")}
    assert list(calls) == ["plain", "hf_generate", "ngram"]
    sizes = [n["batch_size"] for row in calls["plain"]["rows"] for n in row["records"]]
    # Five rows, two at a time: only the last ones of the fifth decode alone.
    assert sizes.count(2) == 4 * 23
    assert arm(joined, "plain").cache_bytes == 2 * arm(alone, "plain").cache_bytes
    for a in joined.arms:
        call = calls[a.name]
        assert a.mismatches == 0
        assert a.tokens == arm(alone, a.name).tokens == 5 * 24
        assert a.batch_tokens_per_s == pytest.approx(5 * 24 / call["wall_s"])
        assert a.batch_decode_tokens_per_s > a.batch_tokens_per_s * 23 / 24
        assert call["wall_s"] > max(row["ttft_s"] + row["decode_s"] for row in call["rows"])


def test_arms_take_turns_and_repeats_forget(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("abcabcab\nabcabcab\n")
    run_bench(config("arms=[{type: suffix}]"), tmp_path / "out")
    rows = calls_of(tmp_path / "out")
    assert [row["arm"] for row in rows[::3]] == ["plain", "hf_generate", "hf_generate", "suffix"]
    drafts = {
        (row["repeat"], row["call"]): [n["num_drafted"] for n in row["rows"][0]["records"]]
        for row in rows
        if row["arm"] == "suffix"
    }
    assert (drafts[0, 0], drafts[0, 1]) == (drafts[1, 0], drafts[1, 1])
    # Within a repeat the second of two equal prompts is drafted from the first one's answer.
    assert len(drafts[0, 1]) < len(drafts[0, 0])


def test_compiled_bench_compiles_before_it_measures(config, tmp_path, monkeypatch):
    quick = partial(arms.CompileConfig, backend="eager", mode="default")
    monkeypatch.setattr(arms, "CompileConfig", quick)
    torch._dynamo.reset()  # other tests compile the same shapes
    settings = config("arms=[{type: ngram}]", "batch_size=2")
    target = load_target(**settings.target.model_dump())
    target.compile_mode = "inductor"
    counts, stats = [], torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(runner, "compile_s", lambda: 3.0)  # asked after the warm-up

    def show(done, total, text):
        counts.append((text, stats["unique_graphs"]))

    results = run_bench(settings, tmp_path / "out", show, target=target)
    measured = [num for text, num in counts if not text.startswith("warm-up")]
    # Batches of two prompts, and of one; neither in a call that is timed.
    assert (measured[0], measured[-1]) == (stats["unique_graphs"], counts[0][1] + 2)
    assert [each.compile_mode for each in results.arms] == ["inductor"] * 3
    assert [each.mismatches for each in results.arms] == [0] * 3
    where = results.provenance
    assert (where.compile_mode, where.compile_s) == ("inductor", 3.0)
    assert "3 s of compilation are in no timed call" in where.notes[-1]
    with pytest.raises(ValueError, match="compile_mode is 'inductor' there, not 'eager'"):
        run_bench(settings, tmp_path / "out")


def test_killed_run_serves_only_what_is_missing(config, tmp_path, measured):
    settings, folder = config("arms=[{type: ngram}]"), tmp_path / "out"
    killed(lambda done, text: done == 7, run_bench, settings, folder)
    records = folder / "records.jsonl"
    before = records.read_text()
    records.write_text(before + '{"repeat": 0, "half a li')
    finished = run_bench(settings, folder)
    assert records.read_text().startswith(before)
    keys = [key_of(row) for row in calls_of(folder)]
    assert run_bench(settings, folder) == finished
    assert len(keys) == len(set(keys)) == len(measured) == 2 * 3 * 3


def test_provenance_is_of_the_start_that_measured(config, tmp_path, monkeypatch):
    events = []

    def note(target):
        events.append("provenance")
        return machine(target) | {"date": str(len(events))}

    monkeypatch.setattr(runner, "machine", note)
    settings, folder = config("arms=[]", "repeats=1"), tmp_path / "out"
    measured = run_bench(settings, folder, lambda done, total, text: events.append(text)).provenance
    assert events[0] == "provenance"
    assert events.count("provenance") == 1
    assert run_bench(settings, folder).provenance == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("device", "device is 'cpu' there, not 'A GPU'"),
        ("target", "is of another target: weights was"),
        ("config", "config.repeats is 1 there, not 2"),
        ("prompts", "requests is .* there, not"),
    ],
)
def test_run_goes_on_only_with_what_it_began_with(config, tmp_path, monkeypatch, change, message):
    target, folder = save_checkpoint(tmp_path / "target"), tmp_path / "out"
    overrides = [f"target.path={target}", "arms=[{type: ngram}]"]
    settings = config(*overrides, "repeats=1")
    killed(lambda done, text: done == 3, run_bench, settings, folder)
    before = (folder / "records.jsonl").read_text()
    if change == "device":
        monkeypatch.setattr(runner, "machine", lambda t: machine(t) | {"device": "A GPU"})
    elif change == "target":
        save_checkpoint(target, perturbed(tiny_llama(), 0.2))
    elif change == "prompts":
        (tmp_path / "prompts.txt").write_text("hello hello\nabcabcab\ny\n")
    repeats = 2 if change == "config" else 1
    with pytest.raises(ValueError, match=rf"{message}.* choose another --out folder or remove"):
        run_bench(config(*overrides, f"repeats={repeats}"), folder)
    assert (folder / "records.jsonl").read_text() == before


def test_finished_run_needs_no_drafter(config, tmp_path):
    draft = save_checkpoint(tmp_path / "draft", perturbed(tiny_llama(), 0.1))
    settings = config(f"arms=[{{type: draft_model, options: {{path: {draft}}}}}]", "repeats=1")
    done = run_bench(settings, tmp_path / "out")
    shutil.rmtree(draft)
    assert run_bench(settings, tmp_path / "out") == done


def test_domains_are_benches_of_their_own_prompts(config, tmp_path):
    lines = [
        {"id": f"{domain}-{i}", "domain": domain, "text": text}
        for i, (domain, text) in enumerate([("sea", "abab"), ("land", "qrs"), ("sea", "see see")])
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = config(
        "arms=[{type: ngram, options: {min_ngram: 1}}]", f"prompts.source={path}", "repeats=1"
    )
    both = arm(run_bench(settings, tmp_path / "both"), "ngram")
    assert {name: each.prompts for name, each in both.domains.items()} == {"sea": 2, "land": 1}
    path.write_text(json.dumps(lines[1]) + "\n")
    land = arm(run_bench(settings, tmp_path / "land"), "ngram")
    assert both.domains["land"].tau == land.tau != both.tau
    assert both.domains["land"].tau_ci is None
    low, high = both.domains["sea"].speedup_vs_plain_ci
    assert low <= both.domains["sea"].speedup_vs_plain <= high


def test_schedule_and_plan_limit_drafts(config, models, tmp_path):
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
    results = run_bench(config(f"arms=[{listed}]", "repeats=1"), tmp_path / "out")
    assert len(arm(results, "free").per_depth) == 4
    assert len(arm(results, "two").per_depth) == 2
    assert arm(results, "two").draft_length == {"1": 2}
    assert (arm(results, "none").per_depth, arm(results, "none").tau) == ([], 1.0)
    drafted = {name: sum(row.drafted for row in arm(results, name).per_prompt) for name in arms}
    assert drafted["planned"] < drafted["two"] < drafted["free"]


@pytest.mark.parametrize("content", [None, "{}", "[]", "text", '{"controller": {"step_s": 3}}'])
def test_plan_without_a_controller_is_named(config, tmp_path, content):
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    settings = config(f"arms=[{{type: ngram, draft_length: {{plan: {plan}}}}}]")
    with pytest.raises(ValueError, match=r"draft_length.plan .*specdec plan"):
        run_bench(settings, tmp_path / "out")
