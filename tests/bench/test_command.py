"""`specdec bench` and what it hands on: suites, and a plan's choice measured beside the arms."""

import json

import pytest
from checkpoints import save_checkpoint
from pydantic import BaseModel
from typer.testing import CliRunner

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


class Configuration(BaseModel):
    """One configuration of a plan."""

    name: str
    type: str = "ngram"
    options: dict[str, int] = {}
    predicted_tau: float = 1.25
    predicted_tau_ci: tuple[float, float] = (1.0, 1.5)
    predicted_speedup: float
    predicted_speedup_ci: None = None
    is_timed: bool = True
    batch_size: int = 1


class Plan(BaseModel):
    choice: Configuration
    configurations: list[Configuration]
    trust: None = None


@pytest.fixture
def plan(monkeypatch):
    """Install a plan, without its measurements, that chooses a name, or "plain"."""
    asked = []

    def install(name):
        def run_plan(config, folder, progress):
            asked.append(config)
            known = [
                Configuration(
                    name="ngram 3", options={"num_draft_tokens": 3}, predicted_speedup=1.5
                ),
                Configuration(name="ngram", predicted_speedup=1.4),
                Configuration(name="two", predicted_speedup=1.3),
            ]
            plain = Configuration(name="plain", type="plain", predicted_speedup=1.0)
            found = next(each for each in [*known, plain] if each.name == name)
            return Plan(choice=found, configurations=known)

        monkeypatch.setattr("specdec.planning.plan.run_plan", run_plan)
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
def test_auto_measures_choice_and_arms_beside_the_prediction(path, plan, choice, arms):
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
def test_choice_named_like_another_arm_is_renamed(path, plan, choice, arm):
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


def test_auto_refuses_a_grid(path, plan):
    asked = plan("ngram")
    done = command(path, "--auto", "grid.batch_size=[1,2]")
    assert done.exit_code == 2
    assert "--auto plans one bench" in done.stderr
    assert asked == []


@pytest.mark.parametrize("flag", ["--list", "--auto"])
def test_suite_refuses_flags_of_benches(path, flag):
    path.write_text("suite: concurrent\n")
    done = command(path, flag)
    assert done.exit_code == 2
    assert f"{flag} is of benches and grids" in done.stderr


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
