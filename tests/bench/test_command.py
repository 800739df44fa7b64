"""`specdec bench`: what it hands on, and how it fails: exit status, message, and kept calls."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from checkpoints import WEIGHTS, edit_weights, save_checkpoint, save_tokenizer
from tiny_suites import Configuration, Plan, save_bench
from typer.testing import CliRunner

from specdec.bench.arms import HFArm
from specdec.cli import app
from specdec.targets.hf import HFTarget

KEYS = "max_new_tokens: 8\nbatch_size: 4\nrepeats: 1\narms: [{type: ngram}]\n"
TEXTS = "abcabc\nhello hello\nxyxyx\nthree\n"


@pytest.fixture
def folder(tmp_path):
    """A configuration of four prompts in one batch, and its target."""
    save_checkpoint(tmp_path / "target")
    save_bench(tmp_path, tmp_path, TEXTS, KEYS)
    return tmp_path


def bench(folder, *more, out="out"):
    config, out = str(folder / "bench.yaml"), str(folder / out)
    done = CliRunner().invoke(app, ["bench", config, *more, "--out", out])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def results(folder):
    found = json.loads((folder / "out" / "results.json").read_text())
    return {arm["name"]: arm for arm in found["arms"]}


# --- Failures ---


def test_failed_prompt_leaves_its_batch_measured(folder):
    letter = ord("z") - 32
    edit_weights(
        folder / "target", lambda w: w["model.embed_tokens.weight"][letter].fill_(float("nan"))
    )
    (folder / "prompts.txt").write_text("abcabc\nhello hello\nzzz\nxyxyx\nthree\n")
    done = bench(folder, "batch_size=5")
    assert done.exit_code == 0, done.stderr
    assert "ngram: 1 of 5 prompts failed: prompt 2, token 0: the target's logits" in done.stderr
    for name in ("plain", "ngram"):
        arm = results(folder)[name]
        (failure,) = arm["failures"]
        assert (arm["failed"], failure["prompt"], failure["repeat"]) == (1, 2, 0)
        assert "logits are NaN" in failure["reason"]
        assert (arm["tokens"], arm["mismatches"]) == (4 * 8, 0)


def test_nan_logits_fail_the_run_with_their_reason(folder):
    edit_weights(folder / "target", lambda w: w["lm_head.weight"].fill_(float("nan")))
    done = bench(folder)
    assert done.exit_code == 1
    assert "every prompt of the arm 'plain' failed: prompt 0, token 0: the target's" in done.stderr
    assert "check the weights" in done.stderr
    arms = results(folder)
    assert arms["plain"]["failed"] == arms["ngram"]["failed"] == 4
    assert arms["plain"]["decode_tokens_per_s"] is None


def test_batch_beyond_memory_says_which_size_fits(folder, monkeypatch):
    prefill = HFTarget.prefill

    def small(self, prompts, *arguments, **options):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ...")
        return prefill(self, prompts, *arguments, **options)

    monkeypatch.setattr(HFTarget, "prefill", small)
    done = bench(folder)
    assert done.exit_code == 1
    assert "Tried to allocate 2 GiB.; 2 of these prompts fit together" in done.stderr
    assert "set batch_size=2" in done.stderr
    assert results(folder)["hf_generate"]["failed"] == 0  # its prompts were not lost
    fitting = bench(folder, "batch_size=2", out="two")
    assert fitting.exit_code == 0, fitting.stderr


def test_prompt_beyond_memory_says_what_helps(folder, monkeypatch):
    def fail(self, prompts, *arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 b")

    monkeypatch.setattr("specdec.targets.hf.check_target", lambda target: None)  # it decodes too
    monkeypatch.setattr(HFTarget, "prefill", fail)
    done = bench(folder)
    assert done.exit_code == 1
    assert "one prompt alone does not fit, lower max_new_tokens" in done.stderr
    arguments = ["generate", "--prompt", "abc", "--target", str(folder / "target")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "out of memory" in done.stderr
    assert "smaller dtype" in done.stderr


@pytest.mark.parametrize("kind", ["draft_model", "hf_assisted"])
def test_unfit_drafter_is_bad_input(folder, kind):
    other = save_checkpoint(folder / "other")

    def refused(path):
        arms = f"arms=[{{type: {kind}, options: {{path: {path}}}}}]"
        done = bench(folder, arms, "batch_size=1")
        assert done.exit_code == 2
        return done.stderr

    save_tokenizer(other, first=8)
    for fault in ("another tokenizer", "corrupt or truncated"):
        said = refused(other)
        assert fault in said
        assert str(other) in said
        (other / WEIGHTS).write_bytes(b"short")
    assert "'./gone' is not a folder" in refused("./gone")
    assert "no option 'num'" in refused("demo, num: 3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("target.path=./nothing", ["'./nothing' is not a folder"]),
        ("prompts.source=./nothing.jsonl", ["'./nothing.jsonl' but must be a file, a folder"]),
        ("arms=[{type: ngrams}]", ["'ngrams'", "did you mean 'ngram'"]),
        ("arms=[{type: ngram, options: {max_gram: 3}}]", ["no option 'max_gram'", "max_ngram"]),
        ("arms=[{type: draft_model}]", ["needs the option 'path'"]),
        ("target.device=cuda:99", ["'cuda:99'", "use cpu"]),
    ],
)
def test_options_that_fit_nothing_are_bad_input(folder, override, words):
    done = bench(folder, override)
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("abc\n" + "a" * 256 + "\n", ["prompt 1 has 256 tokens", "holds 256", "shorten"]),
        ("\n", ["{path}", "holds no prompts"]),
    ],
)
def test_prompts_that_do_not_fit_are_bad_input(folder, texts, words):
    path = folder / "prompts.txt"
    path.write_text(texts)
    done = bench(folder)
    assert done.exit_code == 2
    assert all(word.format(path=path) in done.stderr for word in words), done.stderr
    assert not (folder / "out" / "results.json").exists()


def test_full_disk_fails_the_run_that_then_resumes(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        done = bench(folder, "batch_size=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1
    assert "no space left" in done.stderr
    assert "same command again" in done.stderr
    records = folder / "out" / "records.jsonl"
    kept = records.read_bytes()
    assert kept.count(b'"call"') > 0
    done = bench(folder, "batch_size=2")
    assert done.exit_code == 0, done.stderr
    assert records.read_bytes().startswith(kept)
    assert results(folder)["plain"]["tokens"] == 4 * 8


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0), ("float16", 0)])
def test_differences_fail_the_run_in_float32_alone(folder, monkeypatch, dtype, status):
    decode = HFArm._decode

    def changed(*given):
        return [replace(run, tokens=[*run.tokens[:4], 1, 2]) for run in decode(*given)]

    monkeypatch.setattr(HFArm, "_decode", changed)
    done = bench(folder, f"target.dtype={dtype}", "arms=[]", "max_new_tokens=6")
    assert done.exit_code == status, done.stderr
    plain = results(folder)["plain"]
    assert plain["mismatches"] == len(plain["differences"]) == 4
    for difference in plain["differences"]:
        assert (difference["against"], difference["position"]) == ("hf_generate", 4)
        assert difference["top2_gap"] >= 0
    assert "differ" in done.stdout  # the table comes first
    if status:
        assert "outputs differ at temperature 0 in float32" in done.stderr
        assert "prompt 0 from output token 4 on (top-2 logit gap" in done.stderr


# --- A plan's choice ---


GIVEN = "arms=[{type: ngram}, {name: two, type: ngram, draft_length: {1: 2}}]"


@pytest.mark.parametrize(
    ("choice", "arms"),
    [
        ("ngram 3", ["ngram 3", "ngram", "two"]),
        ("plain", ["ngram", "two"]),
        # The name is another arm's: both are measured.
        ("two", ["two (planned)", "ngram", "two"]),
    ],
)
def test_auto_measures_choice_and_arms_beside_the_prediction(folder, monkeypatch, choice, arms):
    """A plan, without its measurements, chooses a name."""
    known = [
        Configuration(name="ngram 3", options={"num_draft_tokens": 3}, predicted_speedup=1.5),
        Configuration(name="ngram"),
        Configuration(name="two", predicted_speedup=1.3),
    ]
    plain = Configuration(name="plain", type="plain", predicted_speedup=1.0)
    found = next(each for each in [*known, plain] if each.name == choice)
    asked = []

    def run_plan(config, out, progress):
        asked.append(config)
        return Plan(choice=found, configurations=known)

    monkeypatch.setattr("specdec.planning.plan.run_plan", run_plan)
    done = bench(folder, "--auto", "batch_size=1", GIVEN)
    assert done.exit_code == 0, done.stderr
    is_renamed = "(planned)" in arms[0]
    assert [arm.name for arm in asked[0].arms] == ["ngram", "two"]
    assert list(results(folder)) == ["plain", "hf_generate", *arms]
    now = arms[0] if is_renamed else choice
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1])["choice"] == now
    said = f"The plan's choice {choice!r} is not the arm of that name"
    assert (said in done.stdout) == is_renamed
    # The prediction stands beside the arm that it is of; of a schedule the plan says nothing.
    shown = lines[next(i for i, line in enumerate(lines) if f"The plan chose: {now}" in line) :]
    marked = [line for line in shown if " * " in line]
    assert [line.split(" *")[0] for line in marked] == [now] * (choice != "plain")
    speeds = {"1.25", f"{found.predicted_speedup:.2f}"}
    assert all(speeds <= {*line.split()} for line in marked)
    if not is_renamed:
        rows = [line.split() for line in shown if line.startswith("ngram ")]
        assert any({"1.25", "1.40"} <= {*row} for row in rows)
    assert not any(line.startswith("two  ") for line in shown)
    if is_renamed:
        planned, own = (results(folder)[name] for name in (now, choice))
        assert planned["draft_length"] != own["draft_length"]
        assert not any(line.startswith(f"{choice}  ") for line in shown)


@pytest.mark.parametrize(
    ("content", "flag", "message"),
    [
        ("grid: {seed: [1, 2]}", "--auto", "--auto plans one bench"),
        ("suite: concurrent", "--auto", "--auto is of benches and grids"),
        ("suite: concurrent", "--list", "--list is of benches and grids"),
        ("seed: 1", "suite=concurrent", "would change the suite"),
    ],
)
def test_flag_of_another_kind_is_bad_input(folder, monkeypatch, content, flag, message):
    monkeypatch.setattr("specdec.planning.plan.run_plan", None)  # nothing is planned before
    (folder / "bench.yaml").write_text(content)
    done = bench(folder, flag)
    assert done.exit_code == 2
    assert message in done.stderr


# --- Suites ---


def test_packaged_suite_ends_with_a_summary(tmp_path):
    pytest.importorskip("matplotlib")
    small = ["repeats=1", "threads=1", "users=[2]", "requests_per_user=1"]
    small.append("answer_len={low: 3, high: 4}")
    done = CliRunner().invoke(app, ["bench", "demo/concurrent", *small, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["schema"] == "specdec-suite-2"
    assert [group["name"] for group in last["groups"]] == ["2 users"]
    assert all(arm["mismatches"] == 0 for arm in last["groups"][0]["arms"])
    assert (tmp_path / "suite.png").stat().st_size > 20_000


def test_wrong_suite_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["bench", "demo/concurrent", "users=[0]", "--out", str(out)])
    assert done.exit_code == 2
    assert "users.0 is 0" in done.stderr
    assert not out.exists()
