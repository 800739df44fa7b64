"""Failures of a bench, through the command: exit status, message, and kept calls."""

import json
import resource

import pytest
import torch
from checkpoints import WEIGHTS, edit_weights, save_checkpoint, save_tokenizer
from typer.testing import CliRunner

from specdec.cli import app
from specdec.targets.hf import HFTarget


@pytest.fixture
def folder(tmp_path):
    """A configuration of four prompts in one batch, and its target."""
    save_checkpoint(tmp_path / "target")
    (tmp_path / "prompts.txt").write_text("abcabc\nhello hello\nxyxyx\nthree\n")
    (tmp_path / "bench.yaml").write_text(
        f"target: {{path: {tmp_path / 'target'}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 8\nbatch_size: 4\nrepeats: 1\nthreads: 1\narms: [{type: ngram}]\n"
    )
    return tmp_path


def command(folder, *overrides):
    return ["bench", str(folder / "bench.yaml"), *overrides, "--out", str(folder / "out")]


def bench(folder, *overrides):
    done = CliRunner().invoke(app, command(folder, *overrides))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def results(folder):
    found = json.loads((folder / "out" / "results.json").read_text())
    return {arm["name"]: arm for arm in found["arms"]}


def is_bad_input(done, *words):
    assert done.exit_code == 2
    for word in words:
        assert word in done.stderr
    return True


def test_failed_prompt_leaves_its_batch_measured(folder):
    letter = ord("z") - 32
    edit_weights(
        folder / "target", lambda w: w["model.embed_tokens.weight"][letter].fill_(float("nan"))
    )
    (folder / "prompts.txt").write_text("abcabc\nhello hello\nzzz\nxyxyx\nthree\n")
    done = bench(folder, "batch_size=5")
    assert done.exit_code == 0, done.stderr
    assert "ngram: 1 of 5 prompts failed: prompt 2, token 0: the target's logits" in done.stderr
    arms = results(folder)
    for name in ("plain", "ngram"):
        assert arms[name]["failed"] == 1
        (failure,) = arms[name]["failures"]
        assert (failure["prompt"], failure["repeat"]) == (2, 0)
        assert "logits are NaN" in failure["reason"]
        assert arms[name]["tokens"] == 4 * 8
        assert arms[name]["mismatches"] == 0


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
    fitting = CliRunner().invoke(app, [*command(folder, "batch_size=2")[:-1], str(folder / "two")])
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
    arms = f"arms=[{{type: {kind}, options: {{path: {other}}}}}]"
    save_tokenizer(other, first=8)
    assert is_bad_input(bench(folder, arms, "batch_size=1"), str(other), "another tokenizer")
    (other / WEIGHTS).write_bytes(b"short")
    assert is_bad_input(bench(folder, arms, "batch_size=1"), str(other), "corrupt or truncated")
    gone = arms.replace(str(other), "./gone")
    assert is_bad_input(bench(folder, gone, "batch_size=1"), "'./gone' is not a folder")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target.path=./nothing"], ["'./nothing' is not a folder"]),
        (["prompts.source=./nothing.jsonl"], ["'./nothing.jsonl' but must be a file, a folder"]),
        (["arms=[{type: ngrams}]"], ["'ngrams'", "did you mean 'ngram'"]),
        (["arms=[{type: ngram, options: {max_gram: 3}}]"], ["no option 'max_gram'", "max_ngram"]),
        (["arms=[{type: draft_model}]"], ["needs the option 'path'"]),
        (["rule=tokens"], ["'tokens'", "token"]),
        (["target.device=cuda:99"], ["'cuda:99'", "use cpu"]),
    ],
)
def test_options_that_fit_nothing_are_bad_input(folder, overrides, words):
    assert is_bad_input(bench(folder, *overrides), *words)


def test_prompts_that_do_not_fit_are_bad_input(folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("abc\n" + "a" * 256 + "\n")
    assert is_bad_input(bench(folder), "prompt 1 has 256 tokens", "holds 256", "shorten")
    prompts.write_text("\n")
    assert is_bad_input(bench(folder), str(prompts), "holds no prompts")
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
