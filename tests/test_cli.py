"""The command: what it prints, and how it ends."""

import json
import sys

import pytest
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec.cli import app


@pytest.fixture
def bench(tmp_path):
    """Arguments of a small bench without a tokenizer's chat template or training."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tiny_llama().save_pretrained(tmp_path / "target")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="~").save_pretrained(
        tmp_path / "target"
    )
    (tmp_path / "prompts.txt").write_text("abcabc\nhello hello\n")
    (tmp_path / "bench.yaml").write_text(
        f"target: {{path: {tmp_path / 'target'}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 8\nrepeats: 1\nthreads: 1\narms: [{type: ngram}]\n"
    )
    return ["bench", str(tmp_path / "bench.yaml"), "--out", str(tmp_path / "out")]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_a_bench_ends_with_a_table_a_picture_and_a_json_line(bench, tmp_path):
    done = invoke(*bench)
    assert done.exit_code == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert [arm["name"] for arm in last["arms"]] == ["plain", "hf_generate", "ngram"]
    assert "differ" in done.stdout
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert last["picture"] == str(tmp_path / "out" / "results.png")


def test_without_matplotlib_a_bench_keeps_its_figures(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.cli.measure.find_spec", lambda name: None)
    done = invoke(*bench)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["picture"] is None
    assert (tmp_path / "out" / "results.json").exists()


def test_an_arm_that_is_not_lossless_fails_the_run_after_its_table(bench, monkeypatch):
    from specdec.bench.arms import HFArm

    cut = HFArm._cut
    monkeypatch.setattr(HFArm, "_cut", lambda self, tokens: [*cut(self, tokens)[:-1], 3])
    done = invoke(*bench)
    assert done.exit_code == 1
    assert "outputs differ at temperature 0" in done.stderr
    assert "differ" in done.stdout


def test_an_arm_whose_prompts_all_failed_fails_the_run(bench, monkeypatch):
    from specdec.bench.arms import HFArm

    run = HFArm.__call__
    calls = []

    def fail_after_warm_up(self, *arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("it broke")
        return run(self, *arguments)

    monkeypatch.setattr(HFArm, "__call__", fail_after_warm_up)
    done = invoke(*bench)
    assert done.exit_code == 1
    assert "every prompt of the arm 'hf_generate' failed: RuntimeError: it broke" in done.stderr


def test_an_interrupted_bench_says_how_to_go_on_and_does(bench, monkeypatch):
    from specdec.bench import runner

    summarize = runner.summarize

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "summarize", interrupt)
    done = invoke(*bench)
    assert done.exit_code == 130
    assert "the same command resumes" in done.stderr
    monkeypatch.setattr(runner, "summarize", summarize)
    assert invoke(*bench).exit_code == 0


def test_generate_ends_its_answer_with_a_newline_and_its_figures_go_to_stderr():
    done = invoke("generate", "--prompt", "Good morning", "--max-new-tokens", "4")
    assert done.exit_code == 0
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")
    assert done.stderr.startswith("[4 tokens, length; tau ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--target", "./nothing"], "is not a folder"),
        (["bench", "nothing.yaml"], "not a file"),
        (["bench", "demo", "repeats"], "must be key=value"),
        (["generate"], "--prompt"),
    ],
)
def test_bad_input_ends_with_status_two(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_an_output_folder_that_cannot_be_made_is_bad_input(bench, tmp_path):
    done = invoke(*bench[:-1], str(tmp_path / "prompts.txt" / "out"))
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_help_does_not_load_models_libraries():
    import subprocess

    code = (
        "import sys; from typer.testing import CliRunner; from specdec.cli import app; "
        "CliRunner().invoke(app, ['--help']); print(sorted({'torch', 'transformers'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
