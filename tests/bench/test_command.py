"""`specdec bench` and what it hands on: suites, and a plan's choice measured beside the arms."""

import json
from dataclasses import replace

import pytest
from checkpoints import save_checkpoint
from typer.testing import CliRunner

from specdec.bench.config import ArmConfig
from specdec.cli import app


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "target")
    (tmp_path / "prompts.txt").write_text("abcabc\nhello hello\n")
    (tmp_path / "bench.yaml").write_text(
        f"target: {{path: {tmp_path / 'target'}}}\n"
        f"prompts: {{source: {tmp_path / 'prompts.txt'}}}\n"
        "max_new_tokens: 8\nrepeats: 1\nthreads: 1\n"
        "arms: [{type: ngram}, {name: two, type: ngram, draft_length: {1: 2}}]\n"
    )
    return tmp_path / "bench.yaml"


def command(path, *more):
    return CliRunner().invoke(app, ["bench", str(path), *more, "--out", str(path.parent / "out")])


def predicted(name, speedup, **options):
    return {
        "name": name,
        "type": "plain" if name == "plain" else "ngram",
        "options": options,
        "predicted_tau": 1.25,
        "predicted_tau_ci": [1.0, 1.5],
        "predicted_speedup": speedup,
        "predicted_speedup_ci": None,
        "is_timed": True,
    }


@pytest.fixture
def plan(monkeypatch):
    """What a plan would choose, without its measurements: a name, or "plain"."""
    asked = []

    def install(name):
        def choose(config, folder, progress):
            asked.append(config)
            folder.mkdir(parents=True)
            known = [predicted("ngram 3", 1.5, num_draft_tokens=3)]
            known += [predicted("ngram", 1.4), predicted("two", 1.3), predicted("plain", 1.0)]
            found = next(each for each in known if each["name"] == name)
            content = {"choice": found, "configurations": known[:3]}
            (folder / "plan.json").write_text(json.dumps(content))
            chosen = [ArmConfig(name, "ngram", dict(found["options"]))]
            return replace(config, arms=[] if name == "plain" else chosen)

        monkeypatch.setattr("specdec.planning.plan.choose", choose)
        return asked

    return install


@pytest.mark.parametrize(
    ("choice", "arms"),
    [
        ("ngram 3", ["ngram 3", "ngram", "two"]),
        ("ngram", ["ngram", "two"]),
        ("plain", ["ngram", "two"]),
    ],
)
def test_auto_measures_the_choice_and_the_arms_beside_what_was_predicted(path, plan, choice, arms):
    asked = plan(choice)
    done = command(path, "--auto")
    assert done.exit_code == 0, done.stderr
    assert [arm.name for arm in asked[0].arms] == ["ngram", "two"]
    results = json.loads((path.parent / "out" / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["plain", "hf_generate", *arms]
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1])["choice"] == choice
    shown = lines[next(i for i, line in enumerate(lines) if f"The plan chose: {choice}" in line) :]
    # Predicted tau and speed; "two" has a schedule, of which the plan says nothing.
    assert any(line.startswith("ngram ") and {"1.25", "1.40"} <= {*line.split()} for line in shown)
    assert [line.split(" *")[0] for line in shown if " * " in line] == [choice] * (
        choice != "plain"
    )
    assert not any(line.startswith("two") for line in shown)


@pytest.mark.parametrize(
    ("choice", "arm"),
    [
        ("two", "{name: two, type: ngram, draft_length: {1: 2}}"),
        ("ngram 3", "{name: ngram 3, type: ngram, options: {num_draft_tokens: 5}}"),
    ],
)
def test_a_choice_with_the_name_of_another_arm_is_measured_beside_it(path, plan, choice, arm):
    plan(choice)
    done = command(path, "--auto", f"arms=[{arm}]")
    assert done.exit_code == 0, done.stderr
    results = json.loads((path.parent / "out" / "results.json").read_text())
    now = f"{choice} (planned)"
    assert [each["name"] for each in results["arms"][2:]] == [now, choice]
    planned, given = results["arms"][2:]
    assert (planned["options"], planned["draft_length"]) != (
        given["options"],
        given["draft_length"],
    )
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1])["choice"] == now
    assert f"The plan's choice {choice!r} is not the arm of that name" in done.stdout
    # The prediction stands beside the arm that it is of, not beside the other.
    shown = lines[next(i for i, line in enumerate(lines) if f"The plan chose: {now}" in line) :]
    assert [line.split(" *")[0] for line in shown if " * " in line] == [now]
    assert not any(line.startswith(f"{choice}  ") for line in shown)


def test_auto_and_a_grid_are_refused_together(path, plan):
    asked = plan("ngram")
    done = command(path, "--auto", "grid.batch_size=[1,2]")
    assert done.exit_code == 2
    assert "--auto plans one bench" in done.stderr
    assert asked == []


def test_a_file_with_a_suite_in_it_is_run_as_one(path, monkeypatch):
    ran = []
    monkeypatch.setattr("specdec.cli.bench.bench_suite", lambda *given: ran.append(given))
    path.write_text("suite: concurrent\n")
    done = command(path, "repeats=1")
    assert done.exit_code == 0, done.stderr
    assert ran == [(str(path), ["repeats=1"], path.parent / "out")]


@pytest.mark.parametrize("flag", ["--list", "--auto"])
def test_flags_of_benches_are_refused_for_suites(path, flag):
    path.write_text("suite: concurrent\n")
    done = command(path, flag)
    assert done.exit_code == 2
    assert f"{flag} is of benches and grids" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "a suite is served by one process"), (["--auto"], "costs of one process")],
)
def test_what_is_of_one_process_is_refused_under_a_launcher(path, monkeypatch, flags, message):
    # The processes need not meet for that.
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    if not flags:
        path.write_text("suite: concurrent\n")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    done = command(path, *flags)
    assert done.exit_code == 2
    assert message in done.stderr
