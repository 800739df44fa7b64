"""`specdec report`: what it reads, what it refuses, what it says."""

import copy
import json
import shutil
import sys
from pathlib import Path

import made_runs
import pytest
from json_schema import violations
from typer.testing import CliRunner

from specdec.cli import app
from specdec.report.runs import read_runs

ROOT = Path(__file__).parents[2]
RESULTS = made_runs.bench()


def command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def sections(out):
    data = json.loads((out / "report.json").read_text())
    return data, {section["id"]: section for section in data["sections"]}


@pytest.fixture
def bench(tmp_path):
    return made_runs.write(tmp_path / "bench", "results.json", RESULTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [("results", RESULTS), ("sweep", None)],
)
def test_the_runs_of_these_tests_are_as_the_commands_write_them(tmp_path, name, content):
    schema = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
    found = content or made_runs.sweep(tmp_path)
    assert violations(json.loads(json.dumps(found)), schema) == []


@pytest.mark.parametrize("name", ["plan", "analyze", "suites", "estimate"])
def test_what_these_tests_invent_of_a_run_is_in_its_schema(name):
    made = {
        "plan": made_runs.plan(RESULTS),
        "analyze": made_runs.analysis(RESULTS),
        "suites": made_runs.suite(RESULTS),
        "estimate": made_runs.estimate(),
    }
    schema = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
    found = violations(json.loads(json.dumps(made[name])), schema)
    assert [each for each in found if not each.endswith("is missing")] == []


def test_the_command_writes_page_markdown_and_data_and_ends_with_a_line_for_machines(
    bench, tmp_path
):
    done = command(bench, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for name in ("index.html", "report.md", "report.json"):
        assert (tmp_path / "out" / name).is_file()
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["schema"] == "specdec-report-1"
    assert last["figures"] == 4
    # A section without its kind of run says what it would need.
    _, found = sections(tmp_path / "out")
    assert "calibration" not in found
    said = " ".join(found["absent"]["missing"])
    for words in ("Calibration: No analysis among", "Plan: No plan among", "Suites: No suite"):
        assert words in said


def test_committed_results_of_the_first_version_are_read_and_what_they_lack_is_told(tmp_path):
    done = command(ROOT / "experiments" / "02-heads" / "t0", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    data, found = sections(tmp_path / "out")
    assert data["runs"] == [{"label": "t0", "kind": "bench", "schema": "specdec-bench-1"}]
    assert {"results", "speed", "acceptance", "time", "speedup", "runs"} <= set(found)
    assert "which does not tell tasks apart" in " ".join(found["absent"]["missing"])
    assert "did not time verify and commit" in " ".join(found["time"]["missing"])
    assert "verify" not in [c["key"] for c in found["time"]["tables"][0]["columns"]]


def test_two_comparable_benches_are_compared_first_of_all(bench, tmp_path):
    other = made_runs.write(tmp_path / "faster", "results.json", made_runs.bench(speed=1.2))
    done = command(bench, other, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    data, _ = sections(tmp_path / "out")
    assert data["sections"][0]["id"] == "comparison"
    rows = data["sections"][0]["tables"][1]["rows"]
    assert [row["arm"] for row in rows] == [arm["name"] for arm in RESULTS["arms"]]
    assert "faster" in data["sections"][0]["tables"][1]["caption"]


def test_a_run_with_an_arm_that_is_faster_than_its_tau_is_refused(tmp_path):
    wrong = made_runs.write(tmp_path / "wrong", "results.json", made_runs.bench(speed=9.0))
    done = command(wrong, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "wrong: the arm 'eagle3 chain' is" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_plan_of_a_busy_machine_is_told_before_any_figure(tmp_path):
    trust = {"is_trusted": False, "reasons": ["the load average was 9.0 on 2 cores"]}
    content = made_runs.plan(RESULTS) | {"trust": trust}
    done = command(made_runs.write(tmp_path / "p", "plan.json", content), "--out", tmp_path / "out")
    (said,) = sections(tmp_path / "out")[0]["warnings"]
    assert said.startswith("p: its times are not to be trusted: the load average was 9.0")
    assert done.exit_code == 0


def test_incomparable_benches_are_refused_with_status_2_and_nothing_is_written(bench, tmp_path):
    results = copy.deepcopy(RESULTS)
    results["provenance"]["config"]["sampling"]["temperature"] = 1.0
    other = made_runs.write(tmp_path / "sampled", "results.json", results)
    done = command(bench, other, "--out", tmp_path / "out")
    assert done.exit_code == 2
    for words in ("sampling.temperature is '0.0' in 'bench'", "'1.0' in 'sampled'", "--allow"):
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_allowed_difference_is_the_first_thing_on_the_page(bench, tmp_path):
    results = copy.deepcopy(RESULTS)
    results["provenance"]["config"]["sampling"]["temperature"] = 1.0
    other = made_runs.write(tmp_path / "sampled", "results.json", results)
    done = command(bench, other, "--allow", "sampling", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    words = "bench and sampled differ in sampling.temperature: 0.0 and 1.0"
    assert words in done.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index(words) < page.index("<h2>")
    assert words in (tmp_path / "out" / "report.md").read_text().split("## ")[0].replace("\\", "")


def test_cells_of_a_sweep_may_differ_for_they_are_not_compared_as_runs(bench, tmp_path):
    made_runs.write(tmp_path / "sweep", "sweep.json", made_runs.sweep(tmp_path / "sweep"))
    done = command(bench, tmp_path / "sweep", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    _, found = sections(tmp_path / "out")
    assert "comparison" not in found
    assert len(found["shapes"]["figures"]) == 4


def test_a_sweep_without_its_cells_still_has_its_arms(tmp_path):
    made_runs.write(tmp_path / "sweep", "sweep.json", made_runs.sweep(tmp_path / "sweep"))
    shutil.rmtree(tmp_path / "sweep" / "cells")
    done = command(tmp_path / "sweep", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert len(sections(tmp_path / "out")[1]["shapes"]["figures"]) == 4


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    places = [tmp_path / name / "t0" for name in ("a", "b")]
    for place in places:
        made_runs.write(place, "results.json", RESULTS)
    assert [run.label for run in read_runs(places)] == ["a/t0", "b/t0"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no folder"),
        (lambda folder: folder.mkdir(), "holds none of results.json"),
        (lambda folder: made_runs.write(folder, "plan.json", {"schema": "x"}), "schema 'x' but"),
        (lambda folder: made_runs.write(folder, "plan.json", [1]), "must hold a JSON object"),
        (
            lambda folder: (folder.mkdir(), (folder / "plan.json").write_text("{")),
            "is no JSON",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_words(tmp_path, make, words):
    make(tmp_path / "run")
    done = command(tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("kind", "file", "holder", "key", "place"),
    [
        ("bench", "results.json", lambda d: d, "arms", "arms"),
        ("bench", "results.json", lambda d: d["arms"][3], "tau", "arms[3].tau"),
        ("bench", "results.json", lambda d: d["arms"][2]["time_s"], "wall", "arms[2].time_s.wall"),
        ("bench", "results.json", lambda d: d["provenance"], "config", "provenance.config.repeats"),
        ("sweep", "sweep.json", lambda d: d["cells"][1], "settings", "cells[1].settings"),
        ("plan", "plan.json", lambda d: d["choice"], "options", "choice.options"),
        ("plan", "analysis.json", lambda d: d["drafters"][0], "expected", "drafters[0].expected"),
        ("suite", "suite.json", lambda d: d["groups"][1], "arms", "groups[1].arms"),
        ("estimate", "estimate.json", lambda d: d["drafters"][0], "best", "drafters[0].best"),
    ],
)
def test_a_file_that_lacks_something_is_named_with_the_place_and_nothing_is_written(
    tmp_path, kind, file, holder, key, place
):
    folder = {each.name: each for each in made_runs.every_kind(tmp_path)}[kind]
    content = json.loads((folder / file).read_text())
    del holder(content)[key]
    made_runs.write(folder, file, content)
    done = command(folder, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    for words in (
        str(folder / file),
        f"has no {place}, which",
        "restore the file, or run it again",
    ):
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_given_twice_is_refused(bench, tmp_path):
    done = command(bench, bench.parent / "." / "bench", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "given twice" in done.stderr


def test_without_matplotlib_the_command_says_what_to_install(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = command(bench, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "pip install 'specdec[plot]'" in done.stderr
    assert not (tmp_path / "out").exists()
