import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from specdec.bench.arms import load_draft_length
from specdec.bench.config import ArmConfig, load_config
from specdec.cli import app
from specdec.planning.measure import Measurements
from specdec.planning.plan import choose
from specdec.targets.load import load_target
from tests.json_schema import violations

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "plan.schema.json").read_text())
ARMS = (
    "arms=[{name: lookup, type: ngram},"
    "{name: mine, type: eagle3, options: {depth: 3, width: 1}},"
    "{type: hf_prompt_lookup}]"
)
SMALL = ("prompts.num=2", "max_new_tokens=12", "threads=1", ARMS)


def run(folder, *overrides):
    command = ["plan", "demo", *SMALL, *overrides, "--quick", "--out", str(folder)]
    return CliRunner().invoke(app, command)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    done = run(folder)
    assert done.exit_code == 0, done.output
    return folder, done, json.loads((folder / "plan.json").read_text())


def test_the_plan_is_written_as_documented(planned):
    assert violations(planned[2], SCHEMA) == []


def test_every_given_arm_is_predicted_under_its_name(planned):
    given = {row["name"] for row in planned[2]["configurations"] if row["is_given"]}
    assert given == {"lookup", "mine"}


def test_the_choice_is_the_fastest_prediction_and_the_others_follow(planned):
    plan = planned[2]
    rows = [(row["is_timed"], row["predicted_speedup"]) for row in plan["configurations"]]
    assert rows == sorted(rows, reverse=True)
    assert rows[0][0]
    if plan["choice"]["type"] != "plain":
        assert plan["choice"] == plan["configurations"][0]
        assert plan["runners_up"] == plan["configurations"][1:6]


def test_a_steps_parts_add_up(planned):
    for row in planned[2]["configurations"]:
        step = row["step_ms"]
        assert step["wall"] == pytest.approx(step["draft"] + step["target"] + step["other"])


def test_the_table_and_the_last_line_show_the_choice(planned):
    _, done, plan = planned
    for text in ("choice", "tau", "fits of measured times", "nodes to draft"):
        assert text in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["choice"]["name"] == plan["choice"]["name"]
    assert last["schedule"] == plan["schedule"]


def test_the_written_configuration_runs_the_choice(planned):
    folder, _, plan = planned
    config = load_config(str(folder / "bench.yaml"))
    wanted = [] if plan["choice"]["type"] == "plain" else [plan["choice"]["name"]]
    assert [arm.name for arm in config.arms] == wanted
    assert (config.prompts.num, config.max_new_tokens, config.threads) == (2, 12, 1)


def test_the_controller_of_the_loop_reads_the_plan(planned):
    folder, _, plan = planned
    arm = ArmConfig(
        name="a",
        type=plan["configurations"][0]["type"],
        draft_length={"plan": str(folder / "plan.json")},
    )
    target = load_target(plan["config"].get("target", {}).get("path", "demo"))
    drafter = SimpleNamespace(makes_trees=False)
    controller = load_draft_length(arm, drafter, target)
    limit = controller.choose(1)
    assert limit is None or limit >= 0
    assert {"1", "2"} <= set(plan["controller"]["step_s"])
    other = replace(arm, type="medusa")
    with pytest.raises(ValueError, match=r"'a' was made for a drafter of type \w+, not medusa"):
        load_draft_length(other, drafter, target)
    target.vocab_size = 7
    with pytest.raises(ValueError, match="made for a target of vocab_size 3072, not 7"):
        load_draft_length(arm, drafter, target)


def test_the_same_command_measures_nothing_again(planned):
    folder, _, plan = planned
    before = (folder / "costs.jsonl").read_bytes()
    config = choose(load_config("demo", SMALL), folder, quick=True)
    assert (folder / "costs.jsonl").read_bytes() == before
    again = json.loads((folder / "plan.json").read_text())
    assert again["choice"] == plan["choice"]
    assert [arm.name for arm in config.arms] == [arm["name"] for arm in plan["config"]["arms"]]


def test_an_interrupted_plan_goes_on_where_it_was(planned, tmp_path):
    folder = planned[0]
    lines = (folder / "costs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "costs.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"phase": "lo')
    assert run(tmp_path).exit_code == 0
    resumed = (tmp_path / "costs.jsonl").read_bytes().splitlines(keepends=True)
    assert resumed[: len(lines) // 2] == lines[: len(lines) // 2]
    assert len(resumed) >= len(lines) // 2 + 1
    assert json.loads((tmp_path / "plan.json").read_text())["costs"]["points"]


def test_the_folder_of_another_plan_is_refused(planned):
    done = run(planned[0], "max_new_tokens=11")
    assert done.exit_code == 2
    assert "holds answers of another run" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[]", "holds no drafter to plan with"),
        ("arms=[{type: ngrm}]", "drafter type is 'ngrm'"),
        ("arms=[{type: ngram, options: {nodes: 3}}]", "no option 'nodes'"),
        ("sampling.repetition_penalty=1.2", "sampling has penalties"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(tmp_path, override, message):
    done = run(tmp_path, override)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "plan.json").exists()
    costs = tmp_path / "costs.jsonl"
    assert not costs.exists() or costs.read_bytes() == b""


def test_a_batch_that_does_not_fit_into_memory_is_left_out_and_named(
    planned, tmp_path, monkeypatch
):
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
    assert set(json.loads((tmp_path / "plan.json").read_text())["schedule"]) == {"1"}
