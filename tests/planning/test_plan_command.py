"""`specdec plan` on the demo: what it writes, and how it goes on after a kill."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from specdec.bench.arms import load_draft_length
from specdec.bench.config import ArmConfig, load_config
from specdec.cli import app
from specdec.planning.measure import Measurements
from specdec.planning.plan import run_plan
from specdec.planning.results import Plan
from specdec.targets.load import load_target

pytestmark = pytest.mark.slow  # plans the demo
ARMS = (
    "arms=[{name: lookup, type: ngram},"
    "{name: mine, type: eagle3, options: {depth: 3, width: 1}},"
    "{type: hf_prompt_lookup}]"
)
SMALL = ("prompts.num=2", "max_new_tokens=12", "threads=1", ARMS)


def run(folder, *overrides):
    command = ["plan", "demo", *SMALL, *overrides, "--quick", "--out", str(folder)]
    return CliRunner().invoke(app, command)


def read(folder):
    return Plan.read(json.loads((folder / "plan.json").read_text()))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    done = run(folder)
    assert done.exit_code == 0, done.output
    return folder, done, read(folder)


def test_the_choice_is_the_fastest_prediction(planned):
    plan = planned[2]
    assert {row.name for row in plan.configurations if row.is_given} == {"lookup", "mine"}
    rows = [(row.is_timed, row.predicted_speedup) for row in plan.configurations]
    assert rows == sorted(rows, reverse=True)
    assert rows[0][0]
    if plan.choice.type != "plain":
        assert plan.choice == plan.configurations[0]
        assert plan.runners_up == plan.configurations[1:6]
    for row in plan.configurations:
        step = row.step_ms
        assert step.wall == pytest.approx(step.draft + step.target + step.other)


def test_the_command_shows_the_choice(planned):
    _, done, plan = planned
    for text in ("choice", "tau", "fits of measured times", "nodes to draft"):
        assert text in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["choice"]["name"] == plan.choice.name
    assert last["schedule"] == {str(size): nodes for size, nodes in plan.schedule.items()}


def test_the_written_configuration_runs_the_choice(planned):
    folder, _, plan = planned
    config = load_config(str(folder / "bench.yaml"))
    wanted = [] if plan.choice.type == "plain" else [plan.choice.name]
    assert [arm.name for arm in config.arms] == wanted
    assert (config.prompts.num, config.max_new_tokens, config.threads) == (2, 12, 1)


def test_the_loops_controller_reads_the_plan(planned):
    folder, _, plan = planned

    def arm(kind):
        draft_length = {"plan": str(folder / "plan.json")}
        return ArmConfig(name="a", type=kind, options={}, draft_length=draft_length)

    target = load_target("demo")
    drafter = SimpleNamespace(makes_trees=False)
    kind = plan.configurations[0].type
    limit = load_draft_length(arm(kind), drafter, target).choose(1)
    assert limit is None or limit >= 0
    assert {1, 2} <= set(plan.controller.step_s)
    with pytest.raises(ValueError, match=r"'a' was made for drafter \w+, not medusa"):
        load_draft_length(arm("medusa"), drafter, target)
    target.compile_mode = "inductor"
    with pytest.raises(ValueError, match="made for compile_mode eager, not inductor"):
        load_draft_length(arm(kind), drafter, target)
    target.vocab_size = 7
    with pytest.raises(ValueError, match="made for vocab_size 3072, not 7"):
        load_draft_length(arm(kind), drafter, target)


def test_the_same_command_measures_nothing_again(planned):
    folder, _, plan = planned
    before = (folder / "costs.jsonl").read_bytes()
    again = run_plan(load_config("demo", SMALL), folder, quick=True)
    assert (folder / "costs.jsonl").read_bytes() == before
    assert again.choice == plan.choice
    assert again.configurations == plan.configurations


def test_an_interrupted_plan_goes_on(planned, tmp_path):
    lines = (planned[0] / "costs.jsonl").read_bytes().splitlines(keepends=True)
    half = lines[: len(lines) // 2]
    (tmp_path / "costs.jsonl").write_bytes(b"".join(half) + b'{"phase": "lo')
    assert run(tmp_path).exit_code == 0
    resumed = (tmp_path / "costs.jsonl").read_bytes().splitlines(keepends=True)
    assert resumed[: len(half)] == half
    assert len(resumed) > len(half)
    assert read(tmp_path).costs.points


def test_the_folder_of_another_plan_is_refused(planned):
    done = run(planned[0], "max_new_tokens=11")
    assert done.exit_code == 2
    assert "holds another run: plan is" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[]", "holds no drafter to plan with"),
        ("arms=[{type: ngrm}]", "drafter type is 'ngrm'"),
        ("arms=[{type: ngram, options: {nodes: 3}}]", "no option 'nodes'"),
        ("sampling.repetition_penalty=1.2", "sampling has penalties"),
    ],
)
def test_bad_input_is_refused_before_measuring(tmp_path, override, message):
    done = run(tmp_path, override)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "plan.json").exists()
    costs = tmp_path / "costs.jsonl"
    assert not costs.exists() or costs.read_bytes() == b""


def test_a_batch_beyond_memory_is_named(planned, tmp_path, monkeypatch):
    decodings = Measurements.decodings

    def small_machine(self, candidates, batch_size, *rest):
        if batch_size == 2:
            raise MemoryError
        return decodings(self, candidates, batch_size, *rest)

    monkeypatch.setattr(Measurements, "decodings", small_machine)
    (tmp_path / "costs.jsonl").write_bytes((planned[0] / "costs.jsonl").read_bytes())
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert "decoding 2 or more rows with" in done.stderr
    assert set(read(tmp_path).schedule) == {1}
