"""Benches: strict configuration, prompts, resuming, and figures that add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import perturbed, tiny_llama

from specdec.bench.config import load_config
from specdec.bench.prompts import load_prompts
from specdec.bench.runner import run_bench

SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("target", tiny_llama()), ("draft", perturbed(tiny_llama(), 0.1))):
        model.save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + i): i for i in range(97)}
    inner = Tokenizer(models.WordLevel(letters, unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="~")


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
    assert set(json.loads(SCHEMA.read_text())["$defs"]["arm"]["required"]) == set(model)
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["arms"][3]["tau"]
        == (model["tau"])
    )


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
    keys = [(b["repeat"], b["batch"], b["arm"]) for b in batches if b["kind"] == "batch"]
    assert len(keys) == len(set(keys)) == 2 * 3 * 5
    finished = json.loads((folder / "results.json").read_text())
    again = json.loads(json.dumps(run_bench(settings, folder)["arms"]))
    assert again == finished["arms"]


def test_a_folder_of_another_configuration_is_refused(config, tmp_path):
    run_bench(load_config(str(config), ["arms=[]", "repeats=1"]), tmp_path / "out")
    with pytest.raises(ValueError, match="another configuration"):
        run_bench(load_config(str(config), ["arms=[]", "repeats=2"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_new_token=3", "did you mean max_new_tokens"),
        ("prompts.nun=3", "did you mean prompts.num"),
        ("repeats=0", "repeats is 0"),
        ("repeats=many", "many"),
        ("arms=[{type: ngram}, {type: ngram}]", "used twice"),
    ],
)
def test_a_wrong_configuration_is_named(config, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(str(config), [override])


def test_prompts_come_from_files_of_three_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n'
    )
    share = [
        {"conversations": [{"from": "human", "value": "three"}, {"from": "gpt", "value": "x"}]}
    ]
    (tmp_path / "b.json").write_text(json.dumps(share))
    (tmp_path / "c.txt").write_text("four\n\nfive\n")
    jsonl = load_prompts(str(tmp_path / "a.jsonl"), 9)
    assert [p.messages[-1]["content"] for p in jsonl] == ["one", "two"]
    assert load_prompts(str(tmp_path / "b.json"), 9)[0].messages[-1]["content"] == "three"
    assert [p.text for p in load_prompts(str(tmp_path / "c.txt"), 9)] == ["four", "five"]


def test_demo_prompts_are_balanced_over_their_domains():
    prompts = load_prompts("demo", 12)
    assert [p.domain for p in prompts[:3]] == ["maths", "service", "coffee"]
    assert len(load_prompts("demo", 1000)) == 80


def test_missing_sources_say_where_to_put_them(monkeypatch):
    monkeypatch.delenv("SPECDEC_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="SPECDEC_DATA_DIR"):
        load_prompts("sgd", 1)
    with pytest.raises(ValueError, match="must be a file or one of"):
        load_prompts("gsm9k", 1)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench", "nothing.yaml"], 2, "not a file"),
        (["bench", "demo", "repeat=1"], 2, "did you mean repeats"),
        (["generate", "--prompt", "x", "--target", "./nothing"], 2, "is not a folder"),
    ],
)
def test_bad_input_ends_with_status_two_and_a_message(arguments, status, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "specdec", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
