"""The command: what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest
from checkpoints import save_checkpoint
from tiny_suites import save_bench
from typer.main import get_command
from typer.testing import CliRunner

import specdec
from specdec.bench import runner
from specdec.cli import app
from specdec.common.distribution import DISTRIBUTION


@pytest.fixture
def bench(tmp_path):
    """Arguments of a small bench without a chat template or training."""
    save_checkpoint(tmp_path / "target")
    keys = "max_new_tokens: 8\nrepeats: 1\narms: [{type: ngram}]\n"
    save_bench(tmp_path, tmp_path, "abcabc\nhello hello\n", keys)
    return ["bench", str(tmp_path / "bench.yaml"), "--out", str(tmp_path / "out")]


def invoke(*arguments, **options):
    return CliRunner().invoke(app, list(arguments), **options)


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_a_bench_ends_with_a_table_a_picture_and_a_json_line(
    bench, tmp_path, monkeypatch, has_matplotlib
):
    if not has_matplotlib:
        monkeypatch.setattr("specdec.cli.measure.find_spec", lambda name: None)
    done = invoke(*bench)
    assert done.exit_code == 0, done.stderr
    assert "differ" in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert [arm["name"] for arm in last["arms"]] == ["plain", "hf_generate", "ngram"]
    picture = tmp_path / "out" / "results.png"
    assert last["picture"] == (str(picture) if has_matplotlib else None)
    assert not has_matplotlib or picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "results.json").exists()


def test_an_interrupted_bench_says_how_to_go_on_and_does(bench, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "summarize", interrupt)
        done = invoke(*bench)
    assert done.exit_code == 130
    assert "the same command resumes" in done.stderr
    assert invoke(*bench).exit_code == 0


def test_generate_ends_its_answer_with_a_newline_and_its_figures_go_to_stderr():
    done = invoke("generate", "--prompt", "Good morning", "--max-new-tokens", "4")
    assert done.exit_code == 0
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")
    assert done.stderr.startswith("[4 tokens, length; tau ")


@pytest.mark.parametrize("compile", ["true", "false", "graphs", "auto"])
def test_generate_hands_on_the_compile_mode(monkeypatch, compile):
    def load(path, **given):
        raise ValueError(f"asked for {given['compile']!r}")

    monkeypatch.setattr("specdec.targets.load.load_target", load)
    done = invoke("generate", "--prompt", "x", "--compile", compile)
    expected = {"true": True, "false": False}.get(compile, compile)
    assert f"asked for {expected!r}" in done.stderr


@pytest.mark.parametrize("name", ["bench", "plan", "analyze"])
def test_waiting_threads_are_told_once(bench, monkeypatch, name):
    def load(**given):
        raise ValueError("enough")

    for module in ("bench.runner", "planning.plan", "analysis.run"):
        monkeypatch.setattr(f"specdec.{module}.load_target", load)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    done = invoke(name, bench[1], "threads=2", "target.device=cpu", *bench[2:])
    assert done.stderr.count("OMP_WAIT_POLICY is passive") == 1
    alone = invoke(name, bench[1], "threads=1", *bench[2:])
    assert "OMP_WAIT_POLICY" not in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--target", "./nothing"], "is not a folder"),
        (["generate", "--prompt", "x", "--compile", "yes"], "compile is 'yes' but must be"),
        (["bench", "demo", "target.compile=no one"], "target.compile is 'no one' but must be"),
        (["generate", "--prompt", "x", "--drafter", "{"], "must be a name or a JSON object"),
        (["generate"], "--prompt"),
        (["bench", "nothing.yaml"], "not a file"),
        (["bench", "demo", "repeats"], "must be key=value"),
        (["bench", "demo", "--out", f"{__file__}/out"], "cannot be written"),
    ],
)
def test_bad_input_ends_with_status_two(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_help_does_not_load_models_libraries():
    code = (
        "import sys; from typer.testing import CliRunner; from specdec.cli import app; "
        "CliRunner().invoke(app, ['--help']); print(sorted({'torch', 'transformers'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ngram"}, "did you mean {type: ngram}?"),
        ({"type": "ngram", "prompt_lookup_max": 3}, "did you mean 'max_ngram'?"),
        ({"type": "eagle3", "num_speculative_tokens": 3}, "did you mean 'depth'?"),
        ({"type": "draft_model", "model": "demo"}, "did you mean 'path'?"),
    ],
)
def test_names_of_engines_are_understood(options, said):
    done = invoke("generate", "--prompt", "x", "--drafter", json.dumps(options))
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_target_may_be_called_the_model_and_is_placed_by_options():
    done = invoke("generate", "--prompt", "x", "--model", "none/here/at/all")
    assert (done.exit_code, "none/here/at/all" in done.stderr) == (2, True)
    words = ("generate", "--prompt", "x", "--max-new-tokens", "2", "--no-plain")
    done = invoke(*words, "--attn-implementation", "eager", "--device-map", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "plain decoding's" not in done.stderr
    assert "x plain decoding's" in invoke(*words[:-1], "--threads", "1").stderr
    assert "--threads is 0 but must be at least 1" in invoke(*words, "--threads", "0").stderr


def test_json_alone_is_on_standard_output_where_it_is_asked_for(monkeypatch):
    done = invoke("drafters", "ngram", "--json")
    assert next(each["name"] for each in json.loads(done.stdout)["options"]) == "num_draft_tokens"
    assert "meaning" in done.stderr
    monkeypatch.setattr(
        "typer.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False
    )
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    shown = invoke("drafters").stdout
    assert "draft_model" in shown
    assert "{" not in shown


def test_version_and_environment_are_told():
    assert invoke("--version").stdout.split() == [DISTRIBUTION, specdec.__version__]
    found = json.loads(invoke("env", "--json").stdout)
    assert {DISTRIBUTION, "python", "torch", "threads", "CUDA"} <= set(found)
    secret = invoke("env", env={"HF_TOKEN": "hidden", "OMP_WAIT_POLICY": "passive"}).stdout
    assert "hidden" not in secret
    assert "OMP_WAIT_POLICY: passive" in secret


def test_every_command_is_grouped_and_told_in_sentences():
    def commands(command):
        for each in getattr(command, "commands", {"": command}).values():
            yield from commands(each) if hasattr(each, "commands") else [each]

    for command in commands(get_command(app)):
        texts = [command.help, *(each.help for each in command.params if each.name != "help")]
        assert all(text and text[0] == text[0].upper() and text[-1] in ".?" for text in texts), (
            texts
        )
    panels = {each.rich_help_panel for each in app.registered_commands + app.registered_groups}
    assert panels == {"Measure", "Data and training", "Checkpoints", "Engines"}
