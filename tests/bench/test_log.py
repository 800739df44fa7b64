"""The performance log: a line a bench, whoever else writes, and its report."""

import json

import pytest
from tiny_chat import lines_of
from tiny_suites import save_bench
from typer.testing import CliRunner

from specdec.bench.config import load_cells
from specdec.bench.log import log_path, log_results
from specdec.bench.runner import run_bench
from specdec.cli import app

KEYS = "max_new_tokens: 4\nrepeats: 1\narms: [{type: ngram}]\n"


@pytest.fixture
def log(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_LOG", str(tmp_path / "state/log.jsonl"))
    return tmp_path / "state/log.jsonl"


@pytest.fixture
def bench(models, tmp_path):
    def run(out, *overrides):
        path = save_bench(tmp_path, models, "abcabc\nxyxyxy\n", KEYS)
        (cell,) = load_cells(str(path), overrides)
        return run_bench(cell.config, tmp_path / out)

    return run


def test_every_bench_that_measures_adds_a_line(bench, log, tmp_path):
    results = bench("1")
    bench("1")  # nothing is left to measure
    bench("2", "arms=[]")
    bench("3", "max_new_tokens=5")
    first, second, other = lines_of(log)
    assert [arm["name"] for arm in first["arms"]] == ["plain", "hf_generate", "ngram"]
    for arm, line in zip(results.arms, first["arms"], strict=True):
        assert (line["tokens_per_s"], line["tau"]) == (arm.decode_tokens_per_s, arm.tau)
    assert first["setting"] == second["setting"] != other["setting"]
    page = ["report", "--log", "--out", str(tmp_path / "page")]
    assert CliRunner().invoke(app, page).exit_code == 0
    report = json.loads((tmp_path / "page/report.json").read_text())
    (section,) = [each for each in report["sections"] if each["id"] == "log"]
    index, arms = (table["rows"] for table in section["tables"])
    assert len(arms) == 3 + 2 + 3
    assert [row["name"] for row in index] == ["ngram", None, "ngram"]
    assert index[0]["speedup"] == other["arms"][2]["speedup"]
    assert len(section["figures"]) == 1  # of the setting that was measured twice
    assert (tmp_path / "page/log-1.png").stat().st_size > 10_000


def test_line_is_written_beside_other_benches_and_fails_none(bench, log, monkeypatch, tmp_path):
    results = bench("1")
    with log.open("ab") as other:
        log_results(results)
        other.write(b'{"of": "another"}\n')
    assert [next(iter(line)) for line in lines_of(log)] == ["date", "date", "of"]
    monkeypatch.setenv("SPECDEC_LOG", str(tmp_path))  # a folder
    with pytest.warns(UserWarning, match="nothing was added to the log"):
        log_results(results)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("off", None), ("", None), ("/a/b", "/a/b"), (None, "/s/specdec/bench.jsonl")],
)
def test_log_is_where_the_environment_says(monkeypatch, given, expected):
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.delenv("SPECDEC_LOG")
    if given is not None:
        monkeypatch.setenv("SPECDEC_LOG", given)
    assert log_path() == expected or str(log_path()) == expected


def test_report_without_run_or_log_is_bad_input(tmp_path):
    for more, said in ([], "no run is given"), (["--log"], "SPECDEC_LOG is off"):
        done = CliRunner().invoke(app, ["report", *more, "--out", str(tmp_path)])
        assert (done.exit_code, said in done.stderr) == (2, True)
