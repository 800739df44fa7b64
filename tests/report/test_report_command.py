"""`specdec report`: what it reads, what it refuses, what it says."""

import csv
import json
import shutil
import sys
from copy import deepcopy

import made_runs
import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.report.runs import read_runs

RESULTS = made_runs.bench()
SAMPLED = deepcopy(RESULTS)
SAMPLED["provenance"]["config"]["sampling"]["temperature"] = 1.0
IMPOSSIBLE = deepcopy(RESULTS)
IMPOSSIBLE["arms"][2] |= {"speedup_vs_plain": 9.5, "speedup_vs_plain_ci": [9.0, 10.0]}


def command(tmp_path, *arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments), "--out", str(tmp_path / "out")])


def report(tmp_path, *arguments):
    """The content of the report that a command made, and its sections by id."""
    done = command(tmp_path, *arguments)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    return done, data, {section["id"]: section for section in data["sections"]}


@pytest.fixture
def bench(tmp_path):
    return made_runs.write(tmp_path / "bench", "results.json", RESULTS)


def test_command_writes_three_files_and_a_summary(bench, tmp_path):
    done, _, found = report(tmp_path, bench)
    for name in ("index.html", "report.md", "report.json"):
        assert (tmp_path / "out" / name).is_file()
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["schema"], last["figures"]) == ("specdec-report-1", 4)
    # A section without its kind of run says what it would need.
    assert "calibration" not in found
    said = " ".join(found["absent"]["missing"])
    for words in ("Calibration: No analysis among", "Plan: No plan among", "Suites: No suite"):
        assert words in said


def test_gaps_of_results_are_told(tmp_path):
    _, data, found = report(tmp_path, made_runs.ROOT / "experiments" / "03-domain" / "bench-gsm8k")
    assert data["runs"] == [{"label": "bench-gsm8k", "kind": "bench", "schema": "specdec-bench-3"}]
    assert {"results", "speed", "acceptance", "time", "speedup", "runs"} <= set(found)
    assert "does not tell tasks apart" in " ".join(found["absent"]["missing"])
    assert "holds no figures by prompt" in " ".join(found["results"]["missing"])
    assert "verify" not in [column["key"] for column in found["time"]["tables"][0]["columns"]]


def test_comparable_benches_are_compared_first(bench, tmp_path):
    content = made_runs.faster(RESULTS, 1.2)
    other = made_runs.write(tmp_path / "faster", "results.json", content)
    _, data, _ = report(tmp_path, bench, other)
    assert [section["id"] for section in data["sections"][:2]] == ["summary", "comparison"]
    (table,) = data["sections"][1]["tables"]
    assert [row["arm"] for row in table["rows"]] == [arm["name"] for arm in RESULTS["arms"]]
    assert "faster" in table["caption"]


def test_plan_of_busy_machine_is_told_first(tmp_path):
    trust = {
        **{"is_trusted": False, "reasons": ["the load average was 9.0 on 2 cores"]},
        **{"plain_step_ms_range": [1.0, 2.0], "load_average": 9.0},
    }
    folder = made_runs.write(tmp_path / "p", "plan.json", made_runs.plan() | {"trust": trust})
    (said,) = report(tmp_path, folder)[1]["warnings"]
    assert said.startswith("p: its times are not to be trusted: the load average was 9.0")


def test_allowed_difference_comes_first_on_the_page(bench, tmp_path):
    other = made_runs.write(tmp_path / "sampled", "results.json", SAMPLED)
    done, *_ = report(tmp_path, bench, other, "--allow", "sampling")
    words = "bench and sampled differ in sampling.temperature: 0.0 and 1.0"
    assert words in done.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index(words) < page.index("<h2>")
    assert words in (tmp_path / "out" / "report.md").read_text().split("## ")[0].replace("\\", "")


@pytest.mark.parametrize("has_cells", [True, False])
def test_cells_of_a_sweep_are_drawn_not_compared(bench, tmp_path, has_cells):
    made_runs.write(tmp_path / "sweep", "sweep.json", made_runs.sweep(tmp_path / "sweep"))
    if not has_cells:
        shutil.rmtree(tmp_path / "sweep" / "cells")
    *_, found = report(tmp_path, bench, tmp_path / "sweep")
    assert "comparison" not in found
    assert len(found["shapes"]["figures"]) == 4


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    places = [tmp_path / name / "t0" for name in ("a", "b")]
    for place in places:
        made_runs.write(place, "results.json", RESULTS)
    runs, _ = read_runs(places)
    assert [run.label for run in runs] == ["a/t0", "b/t0"]


def test_folder_is_searched_and_no_run_in_it_stops_the_report(tmp_path):
    runs, dated = tmp_path / "runs", "provenance.date"
    made_runs.every_kind(runs)
    contents = {
        "older": made_runs.changed(dated, "2020-01-01T00:00:00+00:00"),
        "other": made_runs.changed("provenance.config_fingerprint", "other arms"),
        "sampled": made_runs.changed("provenance.config_fingerprint", "sampled", SAMPLED),
        "impossible": IMPOSSIBLE,
        "ancient": made_runs.changed("schema", "specdec-bench-1"),
        "foreign": {"accuracy": 1},
    }
    for name, content in contents.items():
        made_runs.write(runs / "2026" / name, "results.json", content)
    _, data, found = report(tmp_path, runs)
    kinds = [run["kind"] for run in data["runs"]]
    assert {"bench", "sweep", "analysis", "plan", "estimate", "suite", "train"} == set(kinds)
    assert kinds.count("bench") == 4  # cells of the sweep are its own
    (pair,) = found["comparison"]["tables"]
    assert {"bench", "other"} == set(pair["caption"].split(" against "))
    assert [table["caption"].split(":")[0] for table in found["results"]["tables"][:3]] == [
        *("other", "sampled", "bench")
    ]
    index = found["log"]["tables"][0]["rows"]
    assert len(index) == 5
    assert index[-1]["run"] == "older"
    said = " ".join(found["absent"]["missing"])
    for words in (
        "ancient/results.json' is damaged, or of another version: schema",
        "the schema 'None'",
    ):
        assert words in said
    assert "older: only in Runs over time" in said
    assert f"impossible: the arm {IMPOSSIBLE['arms'][2]['name']!r} is" in said
    # Given by name, it is shown whole.
    older = runs / "2026" / "older"
    _, _, found = report(tmp_path, older, runs / "bench")
    assert found["comparison"]["tables"][0]["caption"] == "bench against older"


def test_best_arm_stands_first_with_what_it_beats(tmp_path):
    busy = made_runs.changed("provenance.load_average", 9.1)
    made_runs.write(tmp_path / "busy", "results.json", busy)
    _, data, found = report(tmp_path, tmp_path / "busy")
    assert data["sections"][0]["id"] == "summary"
    (row,) = found["summary"]["tables"][0]["rows"]
    arms = {arm["name"]: arm for arm in RESULTS["arms"]}
    fastest = max(("plain", "hf_generate"), key=lambda name: arms[name]["decode_tokens_per_s"])
    key = "speedup_vs_plain" if fastest == "plain" else "speedup_vs_hf"
    best = max(list(arms.values())[2:], key=lambda arm: arm[key])
    assert (row["name"], row["over"], row["speedup"]) == (best["name"], fastest, best[key])
    assert row["speedup_ci"] == best[f"{key}_ci"]
    assert row["prompts"] == best["prompts"]
    said = "load 9.1 on 2 cores: speeds are not trustworthy"
    assert row["load"] == said
    assert f"busy: {said}." in data["warnings"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert f'<p class="alarm">{said}</p>' in page
    assert page.index(f'title="load">{said}') < page.index('id="results"')


def test_csv_holds_every_table_not_rounded(bench, tmp_path):
    _, data, _ = report(tmp_path, bench)
    tables = [table for section in data["sections"] for table in section["tables"]]
    files = {path.name for path in (tmp_path / "out" / "csv").iterdir()}
    assert files == {f"{table['id']}.csv" for table in tables}
    with (tmp_path / "out" / "csv" / "arms-1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, arm in zip(rows, RESULTS["arms"], strict=True):
        assert row["name"] == arm["name"]
        assert float(row["speedup_vs_plain"]) == arm["speedup_vs_plain"]
        ends = [float(row[f"speedup_vs_plain_{end}"]) for end in ("low", "high")]
        assert ends == arm["speedup_vs_plain_ci"]
        assert row["tau"] == ("" if arm["tau"] is None else str(arm["tau"]))


def test_training_is_a_row_with_its_gate_and_curves(tmp_path):
    folder = made_runs.write(tmp_path / "t", "results.json", made_runs.training())
    *_, found = report(tmp_path, folder)
    assert found["training"]["missing"] == ["The log of t is gone, and with it its curves."]
    (folder / "log.jsonl").write_text(made_runs.TRAINING_LOG + "{damaged\n")
    *_, found = report(tmp_path, folder)
    (row,) = found["training"]["tables"][0]["rows"]
    assert (row["drafter.type"], row["steps"], row["loss"]) == ("draft_model", 2, 0.65)
    assert (row["parity.predicted_tau"], row["parity.measured_tau"]) == (2.0, 2.01)
    assert row["parity.passed"] is True
    assert (tmp_path / "out" / "training-1.png").stat().st_size > 10_000


# What the folder `run` beside a good one holds: nothing, or a file and its text; what is refused.
REFUSALS = [
    (None, "no folder"),
    (("notes.txt", ""), "holds none of results.json"),
    (("plan.json", '{"schema": "x"}'), "schema 'x' but"),
    (("plan.json", "[1]"), "must hold an object"),
    (("plan.json", "{"), "plan.json"),
    (("results.json", json.dumps(IMPOSSIBLE)), f"run: the arm {RESULTS['arms'][2]['name']!r} is"),
    (
        ("results.json", json.dumps(SAMPLED)),
        "sampling.temperature is '0.0' in 'bench' and '1.0' in 'run'. Run both with the same "
        "sampling, or pass --allow sampling",
    ),
    ("again", "given twice"),
    ("no matplotlib", "pip install 'specdec-lab[plot]'"),
]


@pytest.mark.parametrize(("given", "words"), REFUSALS, ids=[each[1][:20] for each in REFUSALS])
def test_bad_runs_are_refused_and_nothing_is_written(bench, tmp_path, monkeypatch, given, words):
    folders = [bench, tmp_path / "run"]
    if isinstance(given, tuple):
        folders[1].mkdir()
        (folders[1] / given[0]).write_text(given[1])
    elif given == "again":
        folders[1] = bench.parent / "." / "bench"
    elif given == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        del folders[1]
    done = command(tmp_path, *folders)
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {each.name: each for each in made_runs.every_kind(tmp_path_factory.mktemp("runs"))}


@pytest.mark.parametrize(
    ("kind", "file", "place"),
    [
        ("bench", "results.json", "arms"),
        ("bench", "results.json", "arms.3.tau"),
        ("bench", "results.json", "arms.2.time_s.wall"),
        ("bench", "results.json", "provenance.config"),
        ("sweep", "sweep.json", "cells.1.settings"),
        ("plan", "plan.json", "choice.options"),
        ("plan", "analysis.json", "drafters.0.method"),
        ("suite", "suite.json", "groups.1.arms"),
        ("estimate", "estimate.json", "drafters.0.best"),
    ],
)
def test_damaged_file_is_named_with_the_key(folders, tmp_path, kind, file, place):
    content = json.loads((folders[kind] / file).read_text())
    part, key = made_runs.holder(content, place)
    del part[key]
    folder = made_runs.write(tmp_path / kind, file, content)
    done = command(tmp_path, folder)
    assert done.exit_code == 2, done.output
    assert str(folder / file) in done.stderr
    assert place in done.stderr
    assert not (tmp_path / "out").exists()
